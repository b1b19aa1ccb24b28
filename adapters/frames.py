# SPDX-License-Identifier: Apache-2.0
"""Videos whose frames are views of one size, and how families pool what the tower makes of them."""

from __future__ import annotations

import torch

from ..dtypes import LongTensor
from ..ops.pooling import Pooling
from ..tokens import NEWLINE, Layout


def frame_layout(videos: int, frames: int, pooling: Pooling, grid: tuple[int, int], *, newline: bool = False) -> Layout:
    """Layout of ``videos`` videos of ``frames`` frames with ``grid`` (rows, columns) tokens each, frame by frame.

    ``newline``: whether a newline embedding closes each video.
    """
    device, cells = pooling.patch.device, grid[0] * grid[1]
    number = torch.arange(frames * cells, device=device)
    end = [1] if newline else []
    cell = torch.cat([number % cells, number.new_full((len(end),), NEWLINE)])
    row = torch.cat([number // grid[1], number.new_full((len(end),), frames * grid[0] - 1)])
    col = torch.cat([number % grid[1], number.new_full((len(end),), grid[1])])
    frame = torch.cat([number // cells, number.new_full((len(end),), -1)])
    video = torch.arange(videos, device=device)
    return Layout(
        n=[len(cell)] * videos, grid=[(frames * grid[0], grid[1])] * videos, kind=["video"] * videos,
        view=torch.where(frame < 0, -1, frame + frames * video[:, None]), cell=cell.expand(videos, -1),
        row=row.expand(videos, -1), col=col.expand(videos, -1),
        valid=torch.ones(videos, len(cell), dtype=torch.bool, device=device),
        view_image=video.repeat_interleave(frames), view_grid=grid, pooling=pooling, closing_newline=newline,
        projected=[pooling.patches] * (videos * frames) if pooling.behind_projector else None,
    )  # fmt: skip


def frame_pooling(
    views: int, patches: int, taps: tuple[LongTensor, torch.Tensor], device: torch.device, *, behind_projector: bool
) -> Pooling:
    """The same ``taps`` (numbers and weights [N, K]) in every view of ``patches`` patches."""
    first = torch.arange(views, device=device)[:, None, None] * patches
    weight = taps[1].to(device).expand(views, -1, -1)
    return Pooling(taps[0].to(device) + first, weight, patches, behind_projector)
