# SPDX-License-Identifier: Apache-2.0
"""Write the test set of clips: ``python -m vlmcompress.training.video_scenes_testset eval/tasks/scenes_video``.

The frames of a clip stand one below the other in one PNG: repeated rows then cost next to nothing.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import typer
from PIL import Image

from .testset import content_hash
from .video_scenes import SPLITS, VIDEO_KINDS, ask_video, caption, clips

CLIPS, QUESTIONS, VERSION = 250, 6, 1


def video_rows(count: int = CLIPS) -> Iterator[dict]:
    """The rows of the test set: id, strip of frames as PNG bytes, number of frames, questions, caption."""
    seed = SPLITS["test"]
    for i, clip in enumerate(clips("test", count)):
        asked = ask_video(clip, np.random.default_rng((seed, i, 1)), QUESTIONS)
        width, height = clip.frames[0].size
        strip = Image.new("RGB", (width, height * len(clip.frames)))
        for n, frame in enumerate(clip.frames):
            strip.paste(frame, (0, n * height))
        buffer = io.BytesIO()
        strip.save(buffer, format="PNG", optimize=True)
        yield {
            "id": f"scenes-video-{i:04d}",
            "image": {"bytes": buffer.getvalue(), "path": None},
            "frames": len(clip.frames),
            "caption": caption(clip, np.random.default_rng((seed, i, 3))),
            "questions": [{"question": qa.question, "answer": qa.answer, "kind": qa.kind} for qa in asked],
        }


def write(folder: Path) -> None:
    """Write ``test.parquet`` and its note ``test.json``."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = list(video_rows())
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    question = pa.struct([("question", pa.string()), ("answer", pa.string()), ("kind", pa.string())])
    columns = [("id", pa.string()), ("image", image), ("frames", pa.int32()), ("caption", pa.string())]
    table = pa.Table.from_pylist(rows, schema=pa.schema([*columns, ("questions", pa.list_(question))]))
    parquet.write_table(table, folder / "test.parquet", compression="zstd")
    kinds = [qa["kind"] for row in rows for qa in row["questions"]]
    note = {
        "version": VERSION,
        "command": f"python -m vlmcompress.training.video_scenes_testset eval/tasks/{folder.name}",
        "seed": SPLITS["test"],
        "clips": len(rows),
        "frames": rows[0]["frames"],
        "questions": len(kinds),
        "kinds": {kind: kinds.count(kind) for kind in VIDEO_KINDS},
        "sha256": hashlib.sha256((folder / "test.parquet").read_bytes()).hexdigest(),
        "content_sha256": content_hash(rows),
    }
    (folder / "test.json").write_text(json.dumps(note, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(write)
