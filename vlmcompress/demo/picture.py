# SPDX-License-Identifier: Apache-2.0
"""What became of the visual tokens, drawn over the picture: kept and dropped, scores, crops, merged groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from ..eval.overlay import backdrop, draw
from ..ledger import VisualTokens
from .ask import Answer, Run

SIDE = 672
SEAM, GROUP = (255, 255, 255), (15, 15, 15)
#: opacity of the colours over kept and over dropped tokens, of 255
VEIL, PALE = 115, 40


@dataclass(frozen=True)
class Panel:
    """One grid of tokens, [rows, columns] each: ``there`` where a token is, ``alive`` where it, or the token that took
    it in, reached the layer; ``score`` its rank among all in [0, 1], NaN without; ``view`` and ``group`` numbers, -1
    without; ``marks`` the tokens that stand for others."""

    there: np.ndarray
    alive: np.ndarray
    score: np.ndarray
    view: np.ndarray
    group: np.ndarray
    marks: np.ndarray


def panels(ledger: VisualTokens, layer: int = 0) -> list[Panel]:
    """The first picture of a run: its one grid, or the crops and the thumbnail of a tiled one.

    Raises ``ValueError`` for a layer that the model does not have.
    """
    record, layout = ledger.samples[0].images[0], ledger.layout
    n = record.n_original
    kept = np.zeros(n, dtype=bool)
    kept[record.kept_at(layer).numpy()] = True
    owner = np.arange(n)
    merged = np.zeros(n, dtype=bool)
    if ledger.selection is not None and ledger.selection.owner is not None:
        owner = np.full(n, -1)
        for representative, members in zip(record.kept.tolist(), record.sources, strict=True):
            owner[members.numpy()] = representative
            merged[members.numpy()] = len(members) > 1
    alive = (owner >= 0) & kept[owner]
    scores = _ranks(record.scores())
    cell, view = layout.cell[0, :n].cpu().numpy(), record.views.numpy()
    thumbnail = np.zeros(n, dtype=bool) if layout.thumbnail is None else layout.thumbnail.cpu().numpy()[view.clip(0)]
    patch = cell >= 0
    single = len(set(view[patch].tolist())) == 1
    places = [(record.grid, record.rows.numpy(), record.cols.numpy(), patch & (~thumbnail | single))]
    if thumbnail[patch].any() and not single:
        rows, columns = layout.view_grid
        places.append(((rows, columns), cell // columns, cell % columns, patch & thumbnail))
    drawn = []
    for grid, rows, columns, mine in places:
        at = (rows[mine], columns[mine])

        def table(values: np.ndarray, empty: float, grid=grid, at=at, mine=mine) -> np.ndarray:
            out = np.full(grid, empty, dtype=values.dtype)
            out[at] = values[mine]
            return out

        drawn.append(
            Panel(
                table(patch, False), table(alive, False), table(scores if scores is not None else np.full(n, np.nan), np.nan),
                table(view, -1), table(np.where(merged, owner, -1), -1), table(merged & kept & (owner == np.arange(n)), False),
            )
        )  # fmt: skip
    return drawn


def _ranks(scores) -> np.ndarray | None:
    """[n] place of each finite score among them in [0, 1], equal ones the same; None without scores."""
    if scores is None:
        return None
    values = scores.numpy().astype(np.float64)
    finite = np.isfinite(values)
    _, place = np.unique(values[finite], return_inverse=True)
    out = np.full(len(values), np.nan)
    out[finite] = place / max(1, place.max(initial=0))
    return out


def legend(answer: Answer, layer: int = 0, *, colour: bool = True) -> str:
    """What is to be seen in the picture of :func:`paint`, in words."""
    assert answer.ledger is not None
    found = panels(answer.ledger, layer)
    words = [f"Framed: what decoder layer {layer} works on. Pale: dropped before."]
    if any((panel.group >= 0).any() for panel in found):
        words.append("Black outlines: tokens merged into the one with the dot.")
    if any(len(np.unique(panel.view[panel.there])) > 1 for panel in found):
        words.append("Double lines: seams of the crops.")
    if len(found) > 1:
        words.append("Below: the whole picture, which the model sees as well.")
    if colour and any(np.isfinite(panel.score).any() for panel in found):
        words.append("Colour: rank of the method's score, from violet (lowest) to yellow (highest).")
    elif colour:
        words.append("This method publishes no scores, so nothing is coloured.")
    return " ".join(words)


def paint(run: Run, answer: Answer, layer: int = 0, *, colour: bool = True, side: int = SIDE) -> Image.Image:
    """The picture for one compressed answer; the thumbnail of a tiled picture stands below the crops."""
    assert answer.ledger is not None
    found = panels(answer.ledger, layer)
    pictures = []
    for panel in found:
        image = run.image
        if len(found) == 1:
            image = backdrop(run.image, panel.there.shape, run.pixel_values, run.processor)
        pictures.append(_panel(image, panel, colour, side if not pictures else side // 2))
    if len(pictures) == 1:
        return pictures[0]
    gap = 12
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + gap
    return sheet


def _panel(image: Image.Image, panel: Panel, colour: bool, side: int) -> Image.Image:
    rows, columns = panel.alive.shape
    cell = max(1, round(side / max(rows, columns)))
    size = (columns * cell, rows * cell)
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    coloured = colour and np.isfinite(panel.score).any()
    if coloured:
        picture = _tinted(picture, panel.score, panel.alive, VEIL)
    out = draw(picture, panel.alive, side=cell * max(rows, columns))
    if coloured:
        out = _tinted(out, panel.score, ~panel.alive, PALE)
    pen = ImageDraw.Draw(out)
    if (panel.group >= 0).any():
        _seams(pen, panel.group, cell, max(1, cell // 16), GROUP)
        for row, column in zip(*panel.marks.nonzero(), strict=True):
            x, y, r = (int(column) + 0.5) * cell, (int(row) + 0.5) * cell, max(1.5, cell / 7)
            pen.ellipse((x - r, y - r, x + r, y + r), fill="white", outline=GROUP)
    if len(np.unique(panel.view[panel.there])) > 1:
        line = max(2, cell // 8)
        _seams(pen, panel.view, cell, line + 4, GROUP)
        _seams(pen, panel.view, cell, line, SEAM)
    return out


def _tinted(picture: Image.Image, score: np.ndarray, where: np.ndarray, opacity: int) -> Image.Image:
    """``picture`` under a veil of colours ``where`` a rank is known, dark violet for the lowest to yellow for the highest."""
    from matplotlib import colormaps

    known = np.isfinite(score) & where
    colours = (colormaps["viridis"](np.where(known, score, 0))[..., :3] * 255).astype(np.uint8)
    veil = Image.fromarray(colours).resize(picture.size, Image.Resampling.NEAREST)
    mask = Image.fromarray((known * opacity).astype(np.uint8)).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(veil, picture, mask)


def _seams(pen: ImageDraw.ImageDraw, numbers: np.ndarray, cell: int, line: int, colour: tuple[int, int, int]) -> None:
    """Lines between neighbours of different number; nothing where both have none."""
    for row, column in zip(*(numbers[:, 1:] != numbers[:, :-1]).nonzero(), strict=True):
        x, y = (int(column) + 1) * cell, int(row) * cell
        pen.rectangle((x - line // 2 - line % 2, y, x + line // 2 - 1 + line % 2, y + cell - 1), fill=colour)
    for row, column in zip(*(numbers[1:] != numbers[:-1]).nonzero(), strict=True):
        x, y = int(column) * cell, (int(row) + 1) * cell
        pen.rectangle((x, y - line // 2 - line % 2, x + cell - 1, y + line // 2 - 1 + line % 2), fill=colour)
