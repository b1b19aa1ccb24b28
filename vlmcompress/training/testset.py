# SPDX-License-Identifier: Apache-2.0
"""Write a versioned test set of scenes: ``python -m vlmcompress.training.testset scenes eval/tasks/scenes``."""

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer

from .hires import HIRES, HIRES_WEIGHTS
from .questions import KINDS, ask
from .scenes import SceneConfig, make_scene


@dataclass(frozen=True)
class TestSet:
    """A test set: no training or validation run draws from its seed. Scene ``i`` is of the configuration i mod n.

    ``weights`` give the share of each kind of question, as far as the scenes have enough of them.
    """

    seed: int
    images: int
    questions: int
    configs: tuple[SceneConfig, ...]
    weights: dict[str, float]
    version: int = 1


TEST_SETS = {
    # version 2: digits upright, of one size and on a grid, fresh seed; the set of version 1 had been looked at
    "scenes": TestSet(86_420_000, 300, 8, (SceneConfig(),), dict.fromkeys(KINDS, 1.0), version=2),
    "scenes-hires": TestSet(53_170_000, 240, 6, HIRES, HIRES_WEIGHTS),
}


def scene_rows(name: str, count: int | None = None):
    """The rows of a test set: id, image as PNG bytes, questions. Kinds are drawn by their weights, nothing is tuned."""
    if name not in TEST_SETS:
        raise ValueError(f"There is no test set {name!r}; the test sets are {', '.join(sorted(TEST_SETS))}")
    chosen = TEST_SETS[name]
    for i in range(chosen.images if count is None else count):
        scene = make_scene(chosen.seed, i, chosen.configs[i % len(chosen.configs)])
        asked = ask(scene, np.random.default_rng((chosen.seed, i, 1)), chosen.questions, chosen.weights)
        buffer = io.BytesIO()
        scene.image.save(buffer, format="PNG", optimize=True)
        yield {
            "id": f"{name}-{i:04d}",
            "image": {"bytes": buffer.getvalue(), "path": None},
            "questions": [{"question": qa.question, "answer": qa.answer, "kind": qa.kind} for qa in asked],
        }


def content_hash(rows) -> str:
    """A hash over the pixels and the questions of rows, whatever wrote the files."""
    from PIL import Image

    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")).tobytes())
        digest.update(json.dumps([list(qa.values()) for qa in row["questions"]]).encode())
    return digest.hexdigest()


def write(name: str, folder: Path) -> None:
    """Write ``test.parquet`` and its note ``test.json``."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = list(scene_rows(name))
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    question = pa.struct([("question", pa.string()), ("answer", pa.string()), ("kind", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", image), ("questions", pa.list_(question))])
    features = {"info": {"features": {"image": {"_type": "Image"}}}}  # read by the package datasets
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({"huggingface": json.dumps(features)}))
    parquet.write_table(table, folder / "test.parquet", compression="zstd")
    kinds = [qa["kind"] for row in rows for qa in row["questions"]]
    note = {
        "version": TEST_SETS[name].version,
        "command": f"python -m vlmcompress.training.testset {name} eval/tasks/{folder.name}",
        "seed": TEST_SETS[name].seed,
        "images": len(rows),
        "questions": len(kinds),
        "kinds": {kind: kinds.count(kind) for kind in KINDS},
        "sha256": hashlib.sha256((folder / "test.parquet").read_bytes()).hexdigest(),
        "content_sha256": content_hash(rows),
    }
    (folder / "test.json").write_text(json.dumps(note, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(write)
