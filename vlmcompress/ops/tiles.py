# SPDX-License-Identifier: Apache-2.0
"""Images cut into crops: how a small picture of the whole guides what is kept of its parts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import LongTensor


def crop_weights(overview: Tensor, grid: tuple[int, int], tiles: tuple[int, int], tau: float) -> Tensor:
    """How much richer than the average each crop is, by the scores of the part of the overview that it enlarges.

    Args:
        overview: [rows · cols] scores of the overview's cells.
        grid: (rows, cols) of the overview.
        tiles: (rows, columns) of the crops.
        tau: temperature of the softmax over the crops' summed scores.

    Returns:
        [n] float64 factors ``1 + sigma - mean(sigma)`` in raster order of the crops. The part of crop (r, c) are
        ``rows // tiles[0]`` by ``cols // tiles[1]`` cells; left-over rows and columns belong to the last one.
    """
    high, wide = (max(g // t, 1) for g, t in zip(grid, tiles, strict=True))
    row = (torch.arange(grid[0]) // high).clamp_max(tiles[0] - 1)
    col = (torch.arange(grid[1]) // wide).clamp_max(tiles[1] - 1)
    part = (row[:, None] * tiles[1] + col).flatten().to(overview.device)
    total = torch.zeros(tiles[0] * tiles[1], dtype=torch.float64, device=overview.device)
    total.index_add_(0, part, overview.double())
    return richness(total, tau)


def richness(total: Tensor, tau: float) -> Tensor:
    """[n] float64: how much richer than the average each part of a whole is, by the parts' summed scores ``total`` [n]."""
    e = ((total.double() - total.max()) / tau).exp()
    # the small constant decides the truncation to whole tokens when one part takes all
    sigma = e / (e.sum() + 1e-8)
    return 1.0 + sigma - sigma.mean()


def enlarge(overview: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[h · w] scores of an overview (``grid`` rows, cols) spread bilinearly over a picture of ``size`` (h, w) cells."""
    picture = overview.float().view(1, 1, *grid)
    return torch.nn.functional.interpolate(picture, size=size, mode="bilinear", align_corners=False).flatten()


def to_canvas(crops: Tensor, tiles: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Values of the crops' cells, [n, rows · cols], as one picture, [tiles[0] · rows, tiles[1] · cols]."""
    rows = crops.view(*tiles, *grid).transpose(1, 2)
    return rows.reshape(tiles[0] * grid[0], tiles[1] * grid[1])


def from_canvas(canvas: Tensor, tiles: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_canvas`."""
    return canvas.view(tiles[0], grid[0], tiles[1], grid[1]).transpose(1, 2).reshape(tiles[0] * tiles[1], -1)


def combined_scores(local: Tensor, spread: Tensor, present: Tensor, alpha: float = 0.5) -> Tensor:
    """Sum of a crop's own scores and the overview's, each scaled to unit length over the crop's present cells.

    Args:
        local: [V, N] scores of the crops' cells by themselves.
        spread: [V, N] scores of the same cells in the enlarged overview.
        present: [V, N] bool, cells that are not padding.
        alpha: weight of the overview; one half is the plain sum.

    Returns:
        [V, N] fp32, ``-inf`` where no cell is present.
    """
    a, b = (torch.nn.functional.normalize(x.float().masked_fill(~present, 0), dim=-1) for x in (local, spread))
    score = a + b if alpha == 0.5 else 2 * (1 - alpha) * a + 2 * alpha * b
    return score.masked_fill(~present, float("-inf"))


def misplaced_rows(
    present: Tensor, kept: Tensor, tiles: tuple[int, int], grid: tuple[int, int]
) -> tuple[LongTensor, LongTensor]:
    """Where the GlobalCom² code puts kept crop tokens: at their rank among a crop's present cells.

    Args:
        present, kept: [n, rows · cols] bool per crop and cell.
        tiles, grid: (rows, columns) of the crops and of one crop's cells.

    Returns:
        for the kept cells in raster order of (crop, cell): the flat ``crop · N + cell`` number and the place in reading
        order of a picture in which every row is one longer than the crops are wide (the newline's place).
    """
    crop, cell = kept.nonzero(as_tuple=True)
    rank = (present.long().cumsum(1) - 1)[crop, cell]
    row = (crop // tiles[1]) * grid[0] + rank // grid[1]
    col = (crop % tiles[1]) * grid[1] + rank % grid[1]
    return crop * kept.shape[1] + cell, row * (tiles[1] * grid[1] + 1) + col
