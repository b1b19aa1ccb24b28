# SPDX-License-Identifier: Apache-2.0
"""Which patches of a picture were kept: the picture with the dropped ones dimmed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from torch import Tensor

    from ..ledger import ImageRecord

EDGE, PAPER = (255, 196, 0), (255, 255, 255)


def kept_cells(record: ImageRecord, layer: int = 0) -> np.ndarray:
    """[rows, columns] bool: cells of the picture whose token reached decoder layer ``layer``.

    A token that others were merged into lights up its own cell only. Newline tokens have no cell.
    """
    mask = np.zeros(record.grid, dtype=bool)
    kept = record.kept_at(layer)
    kept = kept[~record.is_newline[kept]]
    mask[record.rows[kept].numpy(), record.cols[kept].numpy()] = True
    return mask


def seen_by_the_tower(pixel_values: Tensor, processor: Any) -> Image.Image:
    """The picture as the tower got it: cropped and resized by the processor, normalisation undone."""
    maker = processor.image_processor
    picture = pixel_values.float().cpu().numpy().transpose(1, 2, 0)
    if getattr(maker, "do_normalize", False):
        picture = picture * np.asarray(maker.image_std) + np.asarray(maker.image_mean)
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def draw(image: Image.Image, kept: np.ndarray, *, side: int = 672) -> Image.Image:
    """``image`` enlarged to about ``side`` pixels, dropped cells dimmed and greyed, kept ones framed."""
    rows, columns = kept.shape
    cell = max(1, round(side / max(rows, columns)))
    width, height = columns * cell, rows * cell
    picture = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    dimmed = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, PAPER), 0.62)
    mask = Image.fromarray(kept.astype(np.uint8) * 255).resize((width, height), Image.Resampling.NEAREST)
    out = Image.composite(picture, dimmed, mask)
    pen = ImageDraw.Draw(out)
    line = max(1, cell // 24)
    for row, column in zip(*kept.nonzero(), strict=True):
        left, top = int(column) * cell, int(row) * cell
        # only where a kept region ends, so that neighbours read as one shape
        sides = {
            (-1, 0): (left, top, left + cell - 1, top + line - 1),
            (1, 0): (left, top + cell - line, left + cell - 1, top + cell - 1),
            (0, -1): (left, top, left + line - 1, top + cell - 1),
            (0, 1): (left + cell - line, top, left + cell - 1, top + cell - 1),
        }
        for (dr, dc), box in sides.items():
            r, c = row + dr, column + dc
            if not (0 <= r < rows and 0 <= c < columns and kept[r, c]):
                pen.rectangle(box, fill=EDGE)
    return out


def overlay(image: Image.Image, record: ImageRecord, pixel_values: Tensor | None, processor: Any) -> Image.Image:
    """Kept patches over the picture.

    Drawn on what the tower saw where that is one view of the grid's own proportions; on the user's whole picture
    otherwise (several crops).
    """
    return draw(backdrop(image, record.grid, pixel_values, processor), kept_cells(record))


def backdrop(image: Image.Image, grid: tuple[int, int], pixel_values: Tensor | None, processor: Any) -> Image.Image:
    """What to draw a grid of (rows, columns) on, see :func:`overlay`."""
    if pixel_values is not None and pixel_values.ndim == 4 and len(pixel_values) == 1:
        height, width = pixel_values.shape[-2:]
        if height * grid[1] == width * grid[0]:
            return seen_by_the_tower(pixel_values[0], processor)
    return image
