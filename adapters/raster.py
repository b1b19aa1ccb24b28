# SPDX-License-Identifier: Apache-2.0
"""The geometry of views whose tokens lie in raster order."""

from __future__ import annotations

import torch

from ..dtypes import LongTensor
from ..tokens import Layout


def raster_layout(images: int, grid: tuple[int, int], device: torch.device, *, kind: str = "image") -> Layout:
    """Layout of ``images`` images that are one view of ``grid`` (rows, columns) tokens each, in raster order."""
    per_image = grid[0] * grid[1]
    cell = torch.arange(per_image, device=device).expand(images, -1)
    view = torch.arange(images, device=device)
    return Layout(
        n=[per_image] * images,
        grid=[grid] * images,
        kind=[kind] * images,
        view=view[:, None].expand(-1, per_image),
        cell=cell,
        row=cell // grid[1],
        col=cell % grid[1],
        valid=torch.ones_like(cell, dtype=torch.bool),
        view_image=view,
        view_grid=grid,
    )


def raster_blocks(grid: tuple[int, int], side: int) -> LongTensor:
    """[N · side²] raster places of the patches of each token, for a ``grid`` of tokens of ``side`` × ``side`` patches."""
    rows, cols = grid
    patch = torch.arange(rows * side * cols * side).view(rows, side, cols, side)
    return patch.transpose(1, 2).flatten()
