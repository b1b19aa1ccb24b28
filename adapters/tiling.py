# SPDX-License-Identifier: Apache-2.0
"""Images cut into tiles that follow each other in the prompt, a thumbnail behind them: neither padding nor newlines.

Where videos come through the same door, their frames are views too, and only the prompt tells what is what.
"""

from __future__ import annotations

import torch

from ..dtypes import LongTensor
from ..tokens import Layout
from .raster import raster_layout

#: stands in the place of (rows, columns) for a video, with the number of its frames
VIDEO = -1


def tiled_layout(tiles: list[tuple[int, int]], grid: tuple[int, int], device: torch.device) -> Layout:
    """Layout (not placed) of images in ``tiles[i]`` (rows, columns) tiles of ``grid`` tokens each, (0, 0) being uncut.

    A tile's token stands at its own cell of the picture, a thumbnail's at the one under its centre. An image that is
    not cut is its own thumbnail beside others that are; without any of those nothing counts as tiled. ``(VIDEO, n)`` is
    a video of n frames, one below the other. Raises ``ValueError`` for videos beside images that are cut.
    """
    films = [rows == VIDEO for rows, _ in tiles]
    cut = any(rows * cols for (rows, cols), film in zip(tiles, films, strict=True) if not film)
    if cut and any(films):
        raise ValueError(
            "Videos and images in tiles are not compressed in one call on this family, whose model gets both as one stack "
            "of views; give them in calls of their own."
        )
    if not cut and not any(films):
        return raster_layout(len(tiles), grid, device)
    cells = grid[0] * grid[1]
    views = [cols if rows == VIDEO else rows * cols + 1 for rows, cols in tiles]
    shapes = [(cols, 1) if rows == VIDEO else (rows, cols) for rows, cols in tiles]
    pictures = [(max(rows, 1) * grid[0], max(cols, 1) * grid[1]) for rows, cols in shapes]
    first = torch.tensor(views).cumsum(0) - torch.tensor(views)
    places = [_places(*shape, grid, thumbnail=not film) for shape, film in zip(shapes, films, strict=True)]
    row, col, valid, view, cell = (
        torch.nn.utils.rnn.pad_sequence(list(x), batch_first=True).to(device)
        for x in (
            [row for row, _ in places],
            [col for _, col in places],
            [torch.ones(n * cells, dtype=torch.bool) for n in views],
            [start + torch.arange(n).repeat_interleave(cells) for start, n in zip(first, views, strict=True)],
            [torch.arange(cells).repeat(n) for n in views],
        )
    )
    thumbnail = torch.zeros(sum(views), dtype=torch.bool)
    thumbnail[first + torch.tensor(views) - 1] = True
    return Layout(
        n=[n * cells for n in views], grid=pictures, kind=["video" if film else "image" for film in films], view=view,
        cell=cell, row=row, col=col, valid=valid,
        view_image=torch.arange(len(views)).repeat_interleave(torch.tensor(views)).to(device),
        view_grid=grid, tiles=tiles if cut else [], thumbnail=thumbnail.to(device) if cut else None,
    )  # fmt: skip


def _places(rows: int, cols: int, grid: tuple[int, int], *, thumbnail: bool) -> tuple[LongTensor, LongTensor]:
    """Row and column in the picture of every token of one image: its tiles one by one, then its thumbnail."""
    tile = torch.arange(rows * cols)[:, None]
    cell = torch.arange(grid[0] * grid[1])
    row, col = cell // grid[1], cell % grid[1]
    # of an uncut image the picture is the thumbnail
    height, width = max(rows, 1), max(cols, 1)
    small_row, small_col = (2 * row + 1) * height // 2, (2 * col + 1) * width // 2
    if not rows * cols:
        return small_row, small_col
    large_row, large_col = (tile // cols * grid[0] + row).flatten(), (tile % cols * grid[1] + col).flatten()
    if not thumbnail:
        return large_row, large_col
    return torch.cat([large_row, small_row]), torch.cat([large_col, small_col])


def runs(marked: torch.Tensor) -> list[tuple[int, int]]:
    """(first column, length) of every run of marked columns of one row, [S] bool."""
    edges = torch.nn.functional.pad(marked.int(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
    return list(zip(starts.tolist(), (ends - starts).tolist(), strict=True))
