# SPDX-License-Identifier: Apache-2.0
"""Images and videos of one prompt: they pass through the tower one kind at a time and meet in front of the language
model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dtypes import LongTensor
from ..ops.places import on_device
from ..tokens import Layout, Selection
from .run import Run, TowerState


def join(parts: list[Run]) -> Run:
    """One run of the passes ``parts``, whose layouts are placed in the same prompt; images come in reading order."""
    if len(parts) == 1:
        return parts[0]
    layouts = [part.layout for part in parts if part.layout is not None]
    first = [column for layout in layouts for column in layout.column[:, 0].tolist()]
    samples = [sample for layout in layouts for sample in layout.sample]
    order = sorted(range(len(samples)), key=lambda i: (samples[i], first[i]))
    layout = _layout(layouts, order)
    selection = None
    if any(part.selection is not None for part in parts):
        selection = _selection([part.selection or _all(x) for part, x in zip(parts, layouts, strict=True)], order)
    states: dict[int, dict] = defaultdict(dict)
    for method in {key for part in parts for key in part.states}:
        states[method] = _state([part.states[method] for part in parts])
    replaced = [entry for part in parts for entry in part.replaced]
    tower = _tower([(part.tower, len(part.layout.view_image)) for part in parts if part.tower and part.layout])
    return Run(layout, selection, states, replaced=replaced, tower=tower)


def _stack(tensors: list[Tensor], fill: float = 0) -> Tensor:
    """One below the other, [.., n] each, filled up behind to the widest."""
    width = max(t.shape[1] for t in tensors)
    return torch.cat([pad(t, (*[0, 0] * (t.ndim - 2), 0, width - t.shape[1]), value=fill) for t in tensors])


def _layout(parts: list[Layout], order: list[int]) -> Layout:
    pick = on_device(order, parts[0].cell.device)
    views, seen = [0], [0]  # of the parts in front
    for part in parts:
        views.append(views[-1] + len(part.view_image))
        seen.append(seen[-1] + int(part.view_image.max()) + 1)

    def listed(name: str) -> list[Any]:
        values = [value for part in parts for value in getattr(part, name)]
        return [values[i] for i in order]

    def table(name: str) -> LongTensor:
        return _stack([getattr(part, name) for part in parts])[pick]

    tiles = [tile for part in parts for tile in part.tiles or [(0, 0)] * len(part)]
    source = [number + front for part, front in zip(parts, seen, strict=False) for number in part.source]
    thumbnails = [
        torch.zeros_like(p.view_image, dtype=torch.bool) if p.thumbnail is None else p.thumbnail for p in parts
    ]
    windows = [p.view_image.new_zeros(len(p.view_image), 1) if p.window is None else p.window for p in parts]
    sizes = [n for part in parts for n in part.view_sizes]
    same = len({part.view_grid for part in parts}) == 1 and all(part.view_n is None for part in parts)
    return Layout(
        n=listed("n"), grid=listed("grid"), kind=listed("kind"),
        view=_stack([torch.where(p.view < 0, p.view, p.view + v) for p, v in zip(parts, views, strict=False)])[pick],
        cell=table("cell"), row=table("row"), col=table("col"), valid=table("valid"),
        view_image=torch.cat([p.view_image + s for p, s in zip(parts, seen, strict=False)]),
        view_grid=parts[0].view_grid if same else (1, max(p.view_grid[0] * p.view_grid[1] for p in parts)),
        view_n=None if same else sizes,
        sample=listed("sample"), column=table("column"), source=[source[i] for i in order],
        tiles=[tiles[i] for i in order] if any(part.tiles for part in parts) else [],
        projected=[n for p in parts for n in p.projected or [0] * len(p.view_image)],
        chosen_again=any(p.chosen_again for p in parts),
        thumbnail=torch.cat(thumbnails) if any(p.thumbnail is not None for p in parts) else None,
        window=_stack(windows) if any(p.window is not None for p in parts) else None,
    )  # fmt: skip


def _all(layout: Layout) -> Selection:
    """Every token, in order."""
    return Selection(
        torch.arange(layout.cell.shape[1], device=layout.cell.device).expand_as(layout.cell), list(layout.n)
    )


def _selection(parts: list[Selection], order: list[int]) -> Selection:
    pick = on_device(order, parts[0].keep.device)
    counts = [n for part in parts for n in part.counts]
    owner = copies = None
    if any(part.owner is not None for part in parts):
        owner = _stack([_owners(part) for part in parts], -1)[pick]
    if any(part.copies is not None for part in parts):
        copies = _stack([part.keep if part.copies is None else part.copies for part in parts])[pick]
    return Selection(
        _stack([part.keep for part in parts])[pick], [counts[i] for i in order], owner=owner, copies=copies
    )


def _owners(selection: Selection) -> LongTensor:
    """``owner``, every kept token standing for itself where nothing was merged."""
    if selection.owner is not None:
        return selection.owner
    return selection.places(int(selection.keep.max()) + 1)


def _state(parts: list[dict]) -> dict:
    """What a method wrote down in the passes, as if it had been one (see :meth:`Vision.state`)."""
    joined: dict = {}
    for key in {key for part in parts for key in part}:
        values = [part[key] for part in parts if part.get(key) is not None]
        if key == "flops":
            joined[key] = sum(values)
        elif len(values) < len(parts):
            continue
        elif isinstance(values[0], Tensor) and values[0].ndim > 1:
            joined[key] = _stack(values)
        elif isinstance(values[0], list):
            joined[key] = [item for value in values for item in value]
    return joined


def _tower(passes: list[tuple[TowerState, int]]) -> TowerState | None:
    """The counts of all passes, each with its number of views."""
    if not passes:
        return None
    parts = [tower for tower, _ in passes]
    tokens = [sum(layer) for layer in zip(*(part.tokens for part in parts), strict=True)]
    per_view: list[LongTensor | None] = []
    for layer in range(len(tokens)):
        counts = [part.view_tokens[layer] for part in parts]
        alike = [part.tokens[layer] // views for part, views in passes]
        if all(count is None for count in counts) and len(set(alike)) == 1:
            per_view.append(None)
            continue
        full = (torch.full((views,), n, device=part.ids.device) for n, (part, views) in zip(alike, passes, strict=True))
        per_view.append(torch.cat([b if a is None else a for a, b in zip(counts, full, strict=True)]))
    pairs = [torch.cat(layer) for layer in zip(*(part.view_pairs for part in parts), strict=True)]
    return TowerState(parts[0].ids, parts[0].cells, tokens=tokens, view_tokens=per_view, view_pairs=pairs)
