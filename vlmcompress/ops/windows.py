# SPDX-License-Identifier: Apache-2.0
"""Merging of small square windows of near-identical patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import LongTensor


@dataclass
class MergedWindows:
    """``keep`` [B, n']: representatives of merged windows (most alike first), then all other cells in raster order.

    ``hidden`` [B, n', C]: window means and untouched rows; ``size`` [B, n']: cells that each stands for; ``valid``
    [B, n'] or None when no place is padding; ``owner`` [B, N]: place in ``keep`` that holds each cell now.
    """

    keep: LongTensor
    hidden: Tensor
    size: Tensor
    valid: Tensor | None
    owner: LongTensor


def window_cells(grid: tuple[int, int], window: tuple[int, int]) -> LongTensor:
    """[W, k] raster cells of every window that lies wholly inside ``grid`` (rows, columns); windows do not overlap."""
    rows, cols = grid
    h, w = window
    if rows < h or cols < w:
        return torch.empty(0, h * w, dtype=torch.long)
    cells = torch.arange(rows * cols).view(rows, cols)[: rows - rows % h, : cols - cols % w]
    return cells.unfold(0, h, h).unfold(1, w, w).reshape(-1, h * w)


def window_similarity(patches: Tensor, cells: LongTensor) -> Tensor:
    """Mean cosine between different patches of a window.

    Args:
        patches: [B, N, C].
        cells: [W, k] from :func:`window_cells`.

    Returns:
        [B, W] fp32. No k × k product is formed: the off-diagonal sum of a Gram matrix is ‖Σ u‖² − Σ ‖u‖².
    """
    unit = torch.nn.functional.normalize(patches.float(), dim=-1, eps=1e-8)[:, cells]
    k = cells.shape[1]
    together = unit.sum(2).square().sum(-1) - unit.square().sum((-1, -2))
    return together / (k * (k - 1))


def merge_windows(
    patches: Tensor, grid: tuple[int, int], window: tuple[int, int], threshold: float, *, shared: bool = False
) -> MergedWindows | None:
    """Average every window whose patches are alike.

    Args:
        patches: [B, N, C] in raster order of ``grid`` (rows, columns).
        window: rows and columns of a window; cells outside whole windows are never merged.
        threshold: mean cosine from which on a window is merged (inclusive, compared in fp32).
        shared: merge the same number of windows, the batch's smallest, in every row (the official code); otherwise
            each row has its own number and shorter rows are padded.

    Returns:
        None when no row has anything to merge. Means are taken in fp32 and returned in the dtype of ``patches``.
    """
    batch, n = patches.shape[:2]
    cells = window_cells(grid, window).to(patches.device)
    windows, k = cells.shape
    if not windows:
        return None
    similarity = window_similarity(patches, cells)
    amounts = (similarity >= threshold).sum(1).tolist()
    if shared:
        amounts = [min(amounts)] * batch
    if not any(amounts):
        return None
    rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    merged = rank < torch.tensor(amounts, device=patches.device)[:, None]  # [B, W]
    # the cell at the window's centre (upper left of it in even windows) stands for the mean
    centre = cells[:, (window[0] - 1) // 2 * window[1] + (window[1] - 1) // 2]

    # order: merged windows by rank, untouched cells in raster order, absorbed cells last
    raster = torch.arange(n, device=patches.device)
    key = (windows + raster).expand(batch, -1).clone()
    key[:, cells.flatten()] += (merged * n).repeat_interleave(k, dim=1)
    key[:, centre] = torch.where(merged, rank, key[:, centre])
    length = n - (k - 1) * min(amounts)
    keep = key.argsort(dim=1)[:, :length]
    valid = key.gather(1, keep) < windows + n

    means = patches[:, cells].float().mean(2).to(patches.dtype)
    table = patches.clone()
    table[:, centre] = torch.where(merged[..., None], means, table[:, centre])
    size = torch.ones(batch, n, device=patches.device)
    size[:, centre] = torch.where(merged, float(k), 1.0)

    holder = raster.expand(batch, -1).clone()
    holder[:, cells.flatten()] = torch.where(
        merged.repeat_interleave(k, dim=1), centre.repeat_interleave(k), cells.flatten()
    )
    place = torch.zeros_like(holder).scatter(1, keep, raster[:length].expand(batch, -1))
    return MergedWindows(
        keep=keep,
        hidden=table.gather(1, keep[..., None].expand(-1, -1, table.shape[-1])),
        size=size.gather(1, keep),
        valid=None if len(set(amounts)) == 1 else valid,
        owner=place.gather(1, holder),
    )
