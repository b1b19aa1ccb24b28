# SPDX-License-Identifier: Apache-2.0
"""Average pooling on token grids."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..dtypes import LongTensor


def pool_grid(grid: Tensor, h: int, w: int) -> Tensor:
    """Adaptive average pooling of [B, rows, cols, C] to [B, h · w, C], in fp32, returned in the input's dtype."""
    pooled = nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2).float(), (h, w))
    return pooled.flatten(2).mT.to(grid.dtype)


def resize_pool_grid(grid: Tensor, h: int, w: int) -> Tensor:
    """Average pooling of [B, rows, cols, C] to [B, h · w, C] behind a bilinear resize to the next multiple of h and w.

    What released TokenFLEX models do in place of :func:`pool_grid`: corners are aligned, windows are all of one size and
    never overlap. Equal to :func:`pool_grid` where h and w divide the grid. In fp32, returned in the input's dtype.
    """
    rows, cols = grid.shape[1:3]
    size = (math.ceil(rows / h) * h, math.ceil(cols / w) * w)
    planes = grid.permute(0, 3, 1, 2).float()
    if size != (rows, cols):
        planes = nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=True)
    pooled = nn.functional.avg_pool2d(planes, (size[0] // h, size[1] // w))
    return pooled.flatten(2).mT.to(grid.dtype)


def target_grid(count: int, rows: int, cols: int) -> tuple[int, int]:
    """The (h, w) that ``count`` tokens of a rows × cols grid form.

    A square grid is pooled to a square, so ``count`` must be one. Another grid takes the factors of ``count`` whose
    ratio is nearest to its own. Raises ``ValueError`` when there is no square, or no ratio within a factor of 1.5.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"A token count is a whole number, at least 1, not {count!r}.")
    if count == rows * cols:
        return rows, cols
    if rows == cols:
        side = math.isqrt(count)
        if side * side != count:
            raise ValueError(
                f"{count} tokens do not fit a square grid of patches: a count is the square of a whole number, such as "
                f"{side * side} or {(side + 1) ** 2}."
            )
        return side, side
    pairs = [(h, count // h) for h in range(1, count + 1) if count % h == 0]
    skew, h, w = min((abs(math.log((h / w) / (rows / cols))), h, w) for h, w in pairs)
    if skew > math.log(1.5) + 1e-9:
        raise ValueError(
            f"{count} tokens form no rectangle near the shape of a {rows} × {cols} grid of patches (the nearest is "
            f"{h} × {w}); take a count with better factors."
        )
    return h, w


def bin_owner(rows: int, cols: int, h: int, w: int) -> LongTensor:
    """[rows · cols] bin (raster of h × w) that each cell falls into; cells that two bins share go to the earlier."""
    row = (torch.arange(rows) * h) // rows
    col = (torch.arange(cols) * w) // cols
    return (row[:, None] * w + col).flatten()
