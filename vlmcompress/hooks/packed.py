# SPDX-License-Identifier: Apache-2.0
"""Towers that take the views of a pass one behind the other without padding: between their form and ours, [V, n, …]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..tokens import Layout
from .run import TowerState


def start(layout: Layout, group: int) -> TowerState:
    """Books of a tower that has dropped nothing; ``group`` patches make up one token."""
    sizes = [n * group for n in layout.view_sizes]
    cells = layout.view_grid[0] * layout.view_grid[1] * group
    device = layout.cell.device
    number = torch.arange(cells, device=device)
    ragged = any(n != cells for n in sizes)
    valid = number < torch.tensor(sizes, device=device)[:, None] if ragged else None
    return TowerState(ids=number.expand(len(sizes), -1), cells=cells, valid=valid, group=group, sizes=sizes)


def unpack(x: Tensor, valid: Tensor | None, views: int) -> Tensor:
    """[S, …] rows of all views → [V, n, …], zeros where ``valid`` [V, n] is not."""
    if valid is None:
        return x.unflatten(0, (views, -1))
    return x.new_zeros(*valid.shape, *x.shape[1:]).index_put((valid,), x)


def pack(x: Tensor, valid: Tensor | None) -> Tensor:
    """[V, n, …] → [S, …], rows that are not ``valid`` left out."""
    return x.flatten(0, 1) if valid is None else x[valid]


def present_rows(tower: TowerState) -> tuple[LongTensor, LongTensor]:
    """Row of the full pack of every patch that is present, [S], and how many each view has, [V]."""
    sizes = torch.tensor(tower.sizes, device=tower.ids.device)
    rows = tower.ids + (sizes.cumsum(0) - sizes)[:, None]
    counts = torch.full_like(sizes, tower.ids.shape[1]) if tower.valid is None else tower.valid.sum(1)
    return pack(rows, tower.valid), counts


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
        return whole[..., 0], valid, None
    place = torch.arange(tower.ids.shape[1], device=tower.ids.device).expand_as(tower.ids)
    far = tower.cells
    table = torch.full((len(tower.ids), far + 1), far, dtype=torch.long, device=place.device)
    target = tower.ids if tower.valid is None else tower.ids.masked_fill(~tower.valid, far)
    table.scatter_(1, target, place)
    first = table[:, :-1].unflatten(1, (-1, group)).amin(-1)
    return place[:, : place.shape[1] // group], valid, torch.where(first < far, first // group, -1)
