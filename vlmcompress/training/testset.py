# SPDX-License-Identifier: Apache-2.0
"""Write a versioned test set of scenes: ``python -m vlmcompress.training.testset scenes eval/tasks/scenes``."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import typer

from .questions import KINDS, ask
from .scenes import SceneConfig, make_scene

VERSION = 2  # 2: digits upright, of one size and on a grid, fresh seed; the set of version 1 had been looked at
# name -> (seed, images, questions per image, scenes); no training or validation run draws from these seeds
TEST_SETS = {
    "scenes": (86_420_000, 300, 8, SceneConfig()),
}


def scene_rows(name: str, count: int | None = None):
    """The rows of a test set: id, image as PNG bytes, questions. Kinds are drawn evenly, nothing is tuned."""
    if name not in TEST_SETS:
        raise ValueError(f"There is no test set {name!r}; the test sets are {', '.join(sorted(TEST_SETS))}")
    seed, images, questions, config = TEST_SETS[name]
    for i in range(images if count is None else count):
        scene = make_scene(seed, i, config)
        asked = ask(scene, np.random.default_rng((seed, i, 1)), questions, dict.fromkeys(KINDS, 1.0))
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
        "version": VERSION,
        "command": f"python -m vlmcompress.training.testset {name} eval/tasks/{folder.name}",
        "seed": TEST_SETS[name][0],
        "images": len(rows),
        "questions": len(kinds),
        "kinds": {kind: kinds.count(kind) for kind in KINDS},
        "sha256": hashlib.sha256((folder / "test.parquet").read_bytes()).hexdigest(),
        "content_sha256": content_hash(rows),
    }
    (folder / "test.json").write_text(json.dumps(note, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(write)
