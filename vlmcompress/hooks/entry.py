# SPDX-License-Identifier: Apache-2.0
"""ENTRY: ask the method which visual tokens go in, project only those, and put them where the outer model expects them.

The outer model goes on as if nothing had happened: the projector's output has its usual shape, with NaN in the places
of dropped tokens, and the caller's ``input_ids`` keep their length. The hook on the language model leaves those places
out; NaN, so that features which reach a language model without that hook cannot pass for an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..dtypes import LongTensor
from ..ops.pool import pool_grid
from ..tokens import Layout, Selection
from ..views import EntryTokens
from .answers import checked_selection
from .packed import order_of, pack, start, tokens_of, unpack
from .precision import own_precision, under_autocast
from .run import TowerState, Vision
from .tower import places

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..method import Method


def tokenwise(vision: Vision, adapter: Adapter) -> bool:
    """Whether every row of the projector's output is one visual token, so that only the chosen rows need projecting."""
    pooling = vision.layout.pooling
    return adapter.tokenwise_projector and (pooling is None or not pooling.behind_projector)


def watch_projector(vision: Vision, methods: list[Method], adapter: Adapter) -> None:
    """Hook the projector for one forward pass: choose in front of it, scatter behind it."""

    def pre(module: nn.Module, args: tuple):
        rows = adapter.projector_rows(args[0])
        if adapter.packed_tower:
            assert vision.tower is not None
            cells, valid, _ = tokens_of(vision.tower)
            rows = unpack(rows, valid, len(cells), order_of(cells, valid, vision.tower.window))
        vision.features = rows
        if not tokenwise(vision, adapter):
            return None
        vision.project = under_autocast(lambda rows: _project(vision, rows, module, args, adapter), rows.device)
        choose(vision, methods, adapter)
        embedded = vision.selection is not None and vision.selection.embedded
        vision.layout.chosen_again = vision.layout.projected is not None and not embedded
        if vision.selection is None:
            return None
        picked = vision.selection.features
        if picked is None:
            view, place = _places_of(vision)
            picked = rows[view.clamp_min(0), place.clamp_min(0)]
        if embedded or not picked.shape[1]:
            # the projector has done its work, or has none; it must run, and quantised Linears may not take nothing
            picked = rows[:1, :1]
        if not embedded:
            vision.selection.features = None  # from here on they are rows of the projector
        return (adapter.projector_input(picked.to(rows.dtype), args[0]), *args[1:])

    def post(module: nn.Module, args: tuple, output: Tensor):
        pooling = vision.layout.pooling
        if pooling is not None and pooling.behind_projector:
            vision.features = pooling(output)
            if any(method.before_pooling for method in methods):
                vision.unpooled = output
        if vision.selection is None or not tokenwise(vision, adapter):
            return None
        if vision.selection.embedded:
            output, vision.selection.features = vision.selection.features.to(output.dtype), None
        table = _scatter(vision, output, float("nan") if adapter.projector_end is adapter.projector else 0.0)
        return adapter.projector_output(_like_stock(table, vision, adapter))

    def end(module: nn.Module, args: tuple, output: Tensor):
        if vision.selection is None or not tokenwise(vision, adapter):
            return None
        # a product with NaN would make NaN of a weight's gradient, though nobody uses the place
        there = _scatter(vision, output.new_ones(*vision.selection.keep.shape, 1), 0.0)
        return output.masked_fill(there == 0, float("nan"))

    def side(module: nn.Module, args: tuple, output: Tensor):
        tower = vision.tower
        if tower is None or not tower.edited:
            return None
        cells, valid, _ = tokens_of(tower)
        view = torch.arange(len(cells), device=cells.device)[:, None].expand_as(cells)
        rows = unpack(output, valid, len(cells), order_of(cells, valid, tower.window))
        return _like_stock(_table(vision.layout, view, cells, valid, rows, 0.0), vision, adapter)

    for module in adapter.side_projectors:
        vision.handles.append(module.register_forward_hook(side))
    vision.handles.append(adapter.projector.register_forward_pre_hook(pre))
    vision.handles.append(adapter.projector.register_forward_hook(post))
    if adapter.projector_end is not adapter.projector:
        vision.handles.append(adapter.projector_end.register_forward_hook(end))


def _project(vision: Vision, rows: Tensor, module: nn.Module, args: tuple, adapter: Adapter) -> Tensor:
    """[V, N, C'] tokens of all ``rows`` [V, N, C], past the projector's hooks; noted as work of the projector."""
    sizes = vision.layout.projected = vision.layout.view_sizes
    views, width = rows.shape[:2]
    # views that are smaller are padded here, not in the projector
    real = torch.cat([width * view + torch.arange(n) for view, n in enumerate(sizes)]).to(rows.device)
    output = module.forward(adapter.projector_input(rows.flatten(0, 1)[real], args[0]), *args[1:])
    output = output.reshape(len(real), -1)
    return output.new_zeros(views * width, output.shape[-1]).index_copy(0, real, output).unflatten(0, (views, width))


def choose(vision: Vision, methods: list[Method], adapter: Adapter) -> None:
    """Fill ``vision.selection``: what the tower left, or what an ENTRY method picks; None when all tokens go in."""
    if vision.selected:
        return
    vision.selected = True
    layout, tower = vision.layout, vision.tower
    selection: Selection | None = None
    if tower is not None and tower.edited:
        selection = from_tower(layout, tower)
    elif vision.features is not None:
        pooling = getattr(adapter.whole_projector, "pooling_function", pool_grid)
        tokens = EntryTokens(
            layout, vision.features, vision.pixel_values, adapter.pools, pooling, vision.unpooled, vision.project
        )
        for method in methods:
            with own_precision(vision.features.device):
                answer = checked_selection(method.entry(tokens, vision.state(method)), layout, method)
            selection = selection if answer is None else answer
    elif methods:
        raise ValueError(
            "The vision tower did not run in this forward pass (were image features passed in ready-made?); "
            "pass pixel_values so that the method can choose among their tokens."
        )
    untouched = selection is not None and selection.features is None and selection.copies is None
    if untouched and selection.counts == layout.n:
        in_order = torch.arange(selection.keep.shape[1], device=selection.keep.device)
        if torch.equal(selection.keep.masked_fill(~layout.valid, 0), (in_order * layout.valid)):
            selection = None
    vision.selection = selection


def from_tower(layout: Layout, tower: TowerState) -> Selection:
    """The tokens whose patches the tower let through, in the tower's order where an image is one view."""
    cells = layout.view_grid[0] * layout.view_grid[1]
    ids, valid, owner = tokens_of(tower)
    if layout.one_view:
        counts = [ids.shape[1]] * len(layout) if valid is None else valid.sum(1).tolist()
        return Selection(ids, counts, owner=owner)
    if tower.flat and layout.thumbnail is not None:
        selection = _view_after_view(layout, ids, valid)
        if owner is not None:
            selection.owner = _owners(layout, selection, ids, owner)
        return selection
    alive = torch.zeros(len(layout.view_image), cells, dtype=torch.bool, device=ids.device)
    if valid is None:
        alive.scatter_(1, ids, True)
    else:  # padding may point anywhere
        alive[torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)[valid], ids[valid]] = True
    mask = layout.of_views(alive, fill=False)
    # an image that keeps every patch keeps every newline, whatever becomes of the others in its batch
    whole = (mask | ~layout.patch).all(1, keepdim=True)
    selection = Selection.from_mask(layout, whole | (layout.with_newlines(mask) if tower.newlines else mask))
    if tower.leading and len(layout.view_image) == len(layout):
        selection.owner = layout.of_views(owner, fill=-1)
    elif owner is not None and owner.shape[1] == cells:
        selection.owner = _owners(layout, selection, ids, owner)
    return selection


def _view_after_view(layout: Layout, ids: LongTensor, valid: Tensor | None) -> Selection:
    """The tokens ``ids`` [V, n] of tiled pictures, view after view, each in the tower's order."""
    order = torch.arange(layout.cell.shape[1], device=ids.device).expand_as(layout.cell)
    number = layout.to_views(order, fill=-1)
    if bool((number < 0).any()):
        raise ValueError(
            "A picture of this call has padding around it, for which the prompt has no places; a flat sequence of views "
            "needs pictures that fill their tiles."
        )
    number = number.gather(1, ids)
    images: list[list[Tensor]] = [[] for _ in layout.n]
    for view, image in enumerate(layout.view_image.tolist()):
        images[image].append(number[view] if valid is None else number[view][valid[view]])
    keep = [torch.cat(parts) for parts in images]
    return Selection(torch.nn.utils.rnn.pad_sequence(keep, batch_first=True), [len(k) for k in keep])


def _owners(layout: Layout, selection: Selection, ids: LongTensor, owner: LongTensor) -> LongTensor:
    """[I, n_max] place in ``selection.keep`` that took in every token, from what the tower knows of each view alone.

    ``owner`` [V, N]: place in ``ids`` [V, n] that took in every cell, -1 where it was dropped.
    """
    place = selection.places(layout.cell.shape[1])
    holder = ids.gather(1, owner.clamp_min(0))  # [V, N] cells; one that the tiled model cuts off has no place
    held = layout.to_views(place, fill=-1).gather(1, holder).masked_fill(owner < 0, -1)
    return torch.where(layout.patch, layout.of_views(held, fill=-1), place)


def _places_of(vision: Vision) -> tuple[LongTensor, LongTensor]:
    """View and row of the projector's input for every selected token, [I, k_max] each (-1: no patch)."""
    layout, selection, tower = vision.layout, vision.selection, vision.tower
    assert selection is not None
    view = layout.view.gather(1, selection.keep)
    cell = layout.cell.gather(1, selection.keep)
    if tower is not None and tower.edited and not tower.on_grid:
        table = places(tokens_of(tower)[0], tower.cells // tower.group)
        cell = table[view.clamp_min(0), cell.clamp_min(0)].masked_fill(cell < 0, -1)
    return view, cell


def _scatter(vision: Vision, output: Tensor, fill: float) -> Tensor:
    """[.., k, C'] projected tokens → [V, N, C'] with ``fill`` in the dropped places."""
    layout, selection = vision.layout, vision.selection
    assert selection is not None
    view = layout.view.gather(1, selection.keep)
    cell = layout.cell.gather(1, selection.keep)
    return _table(layout, view, cell, selection.real & (cell >= 0), output, fill)


def _table(
    layout: Layout, view: LongTensor, cell: LongTensor, real: Tensor | None, rows: Tensor, fill: float
) -> Tensor:
    """[V, N, C] ``rows`` at their ``view`` and ``cell``, ``fill`` elsewhere."""
    views, cells = len(layout.view_image), layout.view_grid[0] * layout.view_grid[1]
    target = view * cells + cell
    if real is not None:
        # padding and newlines land in one spare row behind the table
        target = torch.where(real, target, views * cells)
    flat = rows.reshape(-1, rows.shape[-1])[: target.numel()]
    table = flat.new_full((views * cells + 1, flat.shape[-1]), fill).index_copy(0, target.flatten(), flat)
    return table[:-1].view(views, cells, -1)


def _like_stock(table: Tensor, vision: Vision, adapter: Adapter) -> Tensor:
    """[V, N, C] in the order in which an untouched tower would have left it; [S, C] where the tower packs."""
    if not adapter.packed_tower:
        return table
    full = start(vision.layout, 1)
    return pack(table, full.valid, full.full_order)


def check_features(layout: Layout, selection: Selection, embeds: Tensor) -> None:
    """Refuse features of another pass: dropped places, and only those, hold NaN."""
    kept = selection.places(layout.valid.shape[1]) >= 0
    gone = embeds[layout.batch_index, layout.column][..., 0].isnan()
    if bool(((gone == kept) & layout.valid & (layout.cell >= 0)).any()):
        raise ValueError("The image features of this call come from another pass; pass pixel_values instead.")
