# SPDX-License-Identifier: Apache-2.0
"""Towers that take the views of a pass one behind the other without padding: between their form and ours, [V, n, …].

Where a tower has attention windows, its pack goes window by window; ours always goes by cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..ops.places import on_device
from ..tokens import Layout
from .run import TowerState


def start(layout: Layout, group: int) -> TowerState:
    """Books of a tower that has dropped nothing; ``group`` patches make up one token."""
    sizes = [n * group for n in layout.view_sizes]
    cells = layout.view_grid[0] * layout.view_grid[1] * group
    if layout.pooling is not None:
        cells = layout.pooling.patches
        sizes = [cells] * len(layout.view_image)
    device = layout.cell.device
    number = torch.arange(cells, device=device)
    ragged = any(n != cells for n in sizes)
    valid = number < on_device(sizes, device)[:, None] if ragged else None
    ids = number.expand(len(sizes), -1)
    order = order_of(ids // group, valid, layout.window)
    return TowerState(
        ids=ids, cells=cells, valid=valid, group=group, sizes=sizes, window=layout.window, order=order, full_order=order
    )


def order_of(cells: LongTensor, valid: Tensor | None, window: LongTensor | None) -> LongTensor | None:
    """Which row, views one behind the other, stands at each place of the tower's own pack: [S]; None: the same one.

    ``cells`` [V, n]: cell of every row. Towers with attention windows take the windows of a view one by one, ``window``
    [V, N] being the window of every cell; inside a window rows follow each other as they stand in ``cells``.
    """
    if window is None:
        return None
    key = window.gather(1, cells)
    if valid is not None:
        key = key.masked_fill(~valid, torch.iinfo(torch.long).max)
    local = key.argsort(dim=1, stable=True)
    real = torch.ones_like(cells, dtype=torch.bool) if valid is None else valid
    place = (real.flatten().cumsum(0) - 1).view_as(cells)
    return place.gather(1, local)[real.gather(1, local)]


def unpack(x: Tensor, valid: Tensor | None, views: int, order: LongTensor | None = None) -> Tensor:
    """[S, …] rows of all views as the tower packs them → [V, n, …], zeros where ``valid`` [V, n] is not."""
    if order is not None:
        x = torch.empty_like(x).index_copy(0, order, x)
    if valid is None:
        return x.unflatten(0, (views, -1))
    return x.new_zeros(*valid.shape, *x.shape[1:]).index_put((valid,), x)


def pack(x: Tensor, valid: Tensor | None, order: LongTensor | None = None) -> Tensor:
    """[V, n, …] → [S, …] as the tower packs them, rows that are not ``valid`` left out."""
    rows = x.flatten(0, 1) if valid is None else x[valid]
    return rows if order is None else rows[order]


def present_rows(tower: TowerState) -> LongTensor:
    """[S] row of the tower's full pack of every patch that is present, in the order of its present pack."""
    sizes = on_device(tower.sizes, tower.ids.device)
    rows = tower.ids + (sizes.cumsum(0) - sizes)[:, None]
    rows = pack(rows, tower.valid, tower.order)
    return rows if tower.full_order is None else tower.full_order.argsort()[rows]


def segments(tower: TowerState, in_windows: bool) -> LongTensor:
    """[V, W] patches in each window of each view; where attention spans whole views, [V, 1] patches of each view."""
    ids, valid = tower.ids, tower.valid
    if not in_windows or tower.window is None:
        return torch.full_like(ids[:, :1], ids.shape[1]) if valid is None else valid.sum(1, keepdim=True)
    own = tower.window.gather(1, ids // tower.group)
    counts = torch.zeros_like(tower.window)  # there are at most as many windows as cells
    return counts.scatter_add(1, own, torch.ones_like(own) if valid is None else valid.long())


def tokens_of(tower: TowerState) -> tuple[LongTensor, Tensor | None, LongTensor | None]:
    """What the projector will make of the present patches.

    Returns the cell in which each token stands, [V, m]; which of them are real (None: all); and for every cell the
    token that took it in ([V, N], -1: none), where that is not the token in its own place.
    """
    group = tower.group
    if group == 1:
        return tower.ids, tower.valid, tower.owner
    valid = None if tower.valid is None else tower.valid[:, ::group]
    left = tower.ids.shape[1] if valid is None else tower.valid.sum(1)
    if not bool(torch.as_tensor(left % group == 0).all()):
        raise ValueError(
            f"This model joins {group} patches to a token; what the tower left is no whole number of tokens."
        )
    if not tower.leading:
        whole = (tower.ids // group).unflatten(1, (-1, group))
        same = (whole == whole[..., :1]).all(-1)
        if not bool((same if valid is None else same | ~valid).all()):
            raise ValueError(
                f"This model joins {group} patches to a token; what the tower left mixes patches of several."
            )
        # whole tokens go on, so that the first patch of each tells where all of it went
        owner = None if tower.owner is None else tower.owner[:, ::group].div(group, rounding_mode="floor")
        return whole[..., 0], valid, owner
    place = torch.arange(tower.ids.shape[1], device=tower.ids.device).expand_as(tower.ids)
    far = tower.cells
    table = torch.full((len(tower.ids), far + 1), far, dtype=torch.long, device=place.device)
    target = tower.ids if tower.valid is None else tower.ids.masked_fill(~tower.valid, far)
    table.scatter_(1, target, place)
    first = table[:, :-1].unflatten(1, (-1, group)).amin(-1)
    return place[:, : place.shape[1] // group], valid, torch.where(first < far, first // group, -1)
