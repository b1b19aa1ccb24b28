# SPDX-License-Identifier: Apache-2.0
"""Pages with blocks of text, empty areas, figures and a large page number: what compression of documents is for.

``python -m vlmcompress.training.documents eval/tasks/documents`` writes the test set. Text is printed in Pillow's own font,
in lines of made-up words: the small models of this project read digits and shapes, no words, so questions that need reading
ask for the page number and for the digits on figures, and the text is what has to be told from blank paper. Every second
page is dense, the others are mostly blank. A page is a pure function of ``(seed, index)``.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from .questions import KINDS, ask
from .scenes import Scene, SceneConfig, Thing, draw_things, place_things
from .testset import content_hash

SEED, PAGES, QUESTIONS, VERSION = 71_350_000, 150, 4, 1
SIDE = 192
#: figures and the page number, as large as the models know them and clear of the lines at which a tile ends
FIGURES = SceneConfig(
    canvas=SIDE, objects=(1, 3), sizes=(16, 30), digit_share=1.0, label_share=1.0, max_repeats=1, tile=96
)
#: reading first: digits twice as often as what can be told by colour and outline
WEIGHTS = {"digit": 2.0, "shape": 1.0, "color": 1.0, "existence": 1.0}
LINE, SIZE = 9, 8  # pixels from line to line, size of type
LETTERS = "aaabcdeeeefghiiilmnnoooprrsssttuv"


@dataclass(frozen=True)
class Page:
    """A page, what stands on it, where ink is (``ink`` [SIDE, SIDE] bool: text only), and whether it is dense."""

    scene: Scene
    ink: np.ndarray
    dense: bool


def make_page(seed: int, index: int) -> Page:
    """Draw page ``index`` of the series ``seed``."""
    rng = np.random.default_rng((seed, index))
    things = place_things(rng, FIGURES)
    dense = index % 2 == 0
    paper = Image.new("RGB", (SIDE, SIDE), tuple(int(v) for v in rng.integers(244, 256, 3)))
    text = Image.new("L", (SIDE, SIDE))
    for box in _blocks(rng, dense):
        _print(ImageDraw.Draw(text), rng, box, things)
    shade = Image.new("RGB", (SIDE, SIDE), (int(rng.integers(20, 70)),) * 3)
    paper.paste(shade, (0, 0), text)
    return Page(Scene(draw_things(paper, things, rng), things), np.asarray(text) > 64, dense)


def _blocks(rng, dense: bool) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of the blocks of text: two columns in full, or one short block anywhere."""
    if dense:
        gutter = int(rng.integers(4, 10))
        half = SIDE // 2
        return [(6, 6, half - gutter, SIDE - 6), (half + gutter, 6, SIDE - 6, SIDE - 6)]
    lines = int(rng.integers(3, 7))
    left, top = int(rng.integers(6, 60)), int(rng.integers(6, SIDE - 6 - lines * LINE))
    return [(left, top, left + int(rng.integers(70, 120)), top + lines * LINE)]


def _print(draw: ImageDraw.ImageDraw, rng, box: tuple[int, int, int, int], things: tuple[Thing, ...]) -> None:
    """Fill a box with lines of words, leaving room around the figures."""
    font = ImageFont.load_default(size=SIZE)
    left, top, right, bottom = box
    for y in range(top, bottom - SIZE, LINE):
        x = float(left)
        while True:
            word = "".join(rng.choice(list(LETTERS), int(rng.integers(2, 9))))
            width = draw.textlength(word, font=font)
            if x + width > right:
                break
            if not any(
                x - 4 < t.x + t.size / 2 and x + width + 4 > t.x - t.size / 2
                and y - 4 < t.y + t.size / 2 and y + SIZE + 4 > t.y - t.size / 2
                for t in things
            ):  # fmt: skip
                draw.text((x, y), word, fill=255, font=font)
            x += width + 3


def text_cells(page: Page, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] bool: cells of a picture of that grid that hold ink of text."""
    high, wide = SIDE // rows, SIDE // columns
    return page.ink[: rows * high, : columns * wide].reshape(rows, high, columns, wide).any((1, 3))


def page_rows(count: int = PAGES) -> Iterator[dict]:
    """The rows of the test set: id, page as PNG bytes, questions."""
    for i in range(count):
        page = make_page(SEED, i)
        asked = ask(page.scene, np.random.default_rng((SEED, i, 1)), QUESTIONS, WEIGHTS)
        buffer = io.BytesIO()
        page.scene.image.save(buffer, format="PNG", optimize=True)
        yield {
            "id": f"documents-{'dense' if page.dense else 'blank'}-{i:04d}",
            "image": {"bytes": buffer.getvalue(), "path": None},
            "questions": [{"question": qa.question, "answer": qa.answer, "kind": qa.kind} for qa in asked],
        }


def write(folder: Path) -> None:
    """Write ``test.parquet`` and its note ``test.json``."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = list(page_rows())
    folder.mkdir(parents=True, exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    question = pa.struct([("question", pa.string()), ("answer", pa.string()), ("kind", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", image), ("questions", pa.list_(question))])
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "test.parquet", compression="zstd")
    kinds = [qa["kind"] for row in rows for qa in row["questions"]]
    note = {
        "version": VERSION,
        "command": f"python -m vlmcompress.training.documents eval/tasks/{folder.name}",
        "seed": SEED,
        "images": len(rows),
        "questions": len(kinds),
        "kinds": {kind: kinds.count(kind) for kind in KINDS if kind in kinds},
        "sha256": hashlib.sha256((folder / "test.parquet").read_bytes()).hexdigest(),
        "content_sha256": content_hash(rows),
    }
    (folder / "test.json").write_text(json.dumps(note, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(write)
