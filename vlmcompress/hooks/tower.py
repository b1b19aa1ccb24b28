# SPDX-License-Identifier: Apache-2.0
"""TOWER: hooks on the vision layers, put on for one forward pass and only where a method wants them.

Binding them per pass keeps decoding free of cost and finds the modules that are there now (LoRA-wrapped or quantised
Linears included).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..compat import checkpoints
from ..ops.scores import folded_cls_logits
from ..views import Joined, TowerEdit, TowerLayer
from .packed import order_of, pack, present_rows, segments, start, unpack
from .precision import own_precision, under_autocast
from .run import TowerState, Vision

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..method import Method


POOLED = (
    "{} drops patches inside the vision tower, but this model pools neighbouring patches of such input behind it; use a "
    "method that chooses the pooled tokens (vtc-cls, grid, ...)."
)


def watch_tower(vision: Vision, methods: list[Method], adapter: Adapter) -> None:
    """Hook the vision layers that ``methods`` ask for; ``vision.release()`` takes the hooks off."""
    wanted = {m: frozenset(m.tower_layers(adapter)) for m in methods}
    acting = [m.name for m in methods if wanted[m] or m.resolution(vision.layout.view_grid) is not None]
    if acting and adapter.pools:
        raise ValueError(
            f"'{acting[0]}' chooses among the tower's patches, but this model's projector pools them to the tokens that the "
            "prompt has places for; give the prompt a place for every patch."
        )
    layers = adapter.tower_layers
    vision.tower = start(vision.layout, adapter.patches_per_token)
    vision.tower.raster = _order(vision, adapter, vision.layout.view_grid)
    vision.handles += _shrink_pixels(vision, methods, adapter)
    for index, block in enumerate(layers):
        callers = [m for m in methods if index in wanted[m]]
        vision.handles += _hook_layer(vision, index, block, callers, adapter)


def _order(vision: Vision, adapter: Adapter, grid: tuple[int, int]) -> Tensor | None:
    """:meth:`Adapter.patch_order` where the pixels are: weights may be anywhere, those of offloaded models nowhere."""
    order = adapter.patch_order(grid)
    return None if order is None else order.to(vision.layout.cell.device)


def _shrink_pixels(vision: Vision, methods: list[Method], adapter: Adapter) -> list:
    """Resize what the tower sees, where a method asks for a smaller grid of tokens."""
    grid = vision.layout.view_grid
    targets = [t for m in methods if (t := m.resolution(grid)) is not None and t != grid]
    if not targets:
        return []
    rows, cols = targets[0]
    if vision.layout.pooling is not None:
        raise ValueError(POOLED.format(", ".join(f"'{m.name}'" for m in methods)))
    group = adapter.patches_per_token
    side, by_token = math.isqrt(group), _order(vision, adapter, (rows, cols))

    def pre(module: nn.Module, args: tuple, kwargs: dict):
        args, kwargs = adapter.shrink_pixels(args, kwargs, (rows * side, cols * side))
        # every small token stands for the cell under its centre
        row = ((torch.arange(rows) * 2 + 1) * grid[0]) // (2 * rows)
        col = ((torch.arange(cols) * 2 + 1) * grid[1]) // (2 * cols)
        assert vision.tower is not None
        ids = (row[:, None] * grid[1] + col).flatten().to(vision.tower.ids.device)
        owner_row = (torch.arange(grid[0]) * rows) // grid[0]
        owner_col = (torch.arange(grid[1]) * cols) // grid[1]
        owner = (owner_row[:, None] * cols + owner_col).flatten().to(ids.device)
        views = vision.tower.ids.shape[0]
        place = torch.arange(group, device=ids.device)
        ids, owner = ((x[:, None] * group + place).flatten() for x in (ids, owner))
        vision.tower.ids, vision.tower.owner = ids.expand(views, -1), owner.expand(views, -1)
        vision.tower.edited = True
        return args, kwargs

    def reorder(module: nn.Module, args: tuple, kwargs: dict):
        """The patches of a token follow each other from here on; positions are in the states already."""
        order = _behind(by_token, adapter.tower_prefix)
        if args:
            return (args[0][:, order], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"][:, order]}

    hooks = [adapter.tower.register_forward_pre_hook(pre, with_kwargs=True)]
    if by_token is not None:
        hooks.append(adapter.tower_layers[0].register_forward_pre_hook(reorder, with_kwargs=True))
    return hooks


def _hook_layer(vision: Vision, index: int, block: nn.Module, callers: list[Method], adapter: Adapter) -> list:
    taps: dict[str, Any] = {}

    def before(module: nn.Module, args: tuple, kwargs: dict):
        changed = _before(vision, index, adapter, args, kwargs)
        if callers:
            taps["arguments"] = kwargs if changed is None else changed[1]
        return changed

    def mask(module: nn.Module, args: tuple, kwargs: dict):
        tower = vision.tower
        assert tower is not None
        if module is not block and checkpoints(block) and (tower.bias is not None or tower.valid is not None):
            raise ValueError(
                "Patches are masked inside this tower's layers, which gradient checkpointing runs again without the mask; "
                "freeze the tower with eval(), or switch checkpointing off."
            )
        return _masked(vision, adapter, args, kwargs)

    hooks = [block.register_forward_pre_hook(before, with_kwargs=True)]
    if not adapter.packed_tower:
        hooks.append(adapter.tower_masked(index).register_forward_pre_hook(mask, with_kwargs=True))
    restores = index == adapter.feature_layer and vision.tower is not None and vision.tower.raster is not None
    if callers:
        for name, module in adapter.tower_projections(index).items():
            hooks.append(module.register_forward_hook(_tap(taps, name)))

        def after(module: nn.Module, args: tuple, output):
            hidden = output[0] if isinstance(output, tuple) else output
            q, k, v = adapter.split_qkv(index, taps)
            plain = adapter.unrotated_keys(index, taps)
            taps.clear()
            tower = vision.tower
            assert tower is not None
            projected = _projected({"q": q, "k": k, "v": v, "plain_k": k if plain is None else plain}, tower, adapter)
            if adapter.packed_tower:
                hidden = unpack(hidden, tower.valid, len(tower.ids), tower.order)
            if tower.raster is not None and not tower.edited:
                hidden = hidden[:, _behind(tower.raster, adapter.tower_prefix)]
            edited = _call(vision, index, hidden, projected, callers, adapter)
            if edited is None:
                return None
            if adapter.packed_tower:
                edited = pack(edited, tower.valid, tower.order)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

    if restores:
        hooks.append(block.register_forward_hook(_back_to_grid(vision, adapter), prepend=True))
    if callers:
        # in front of other hooks, so that recorded hidden states are those that go on
        hooks.append(block.register_forward_hook(after, prepend=True))
    return hooks


def _projected(parts: dict[str, Any], tower: TowerState, adapter: Adapter) -> Callable[[str], Tensor]:
    """From a name among ``parts`` to that projection of the tower's views as they stand now, [V, H, prefix + n, d]."""
    views, valid, order = len(tower.ids), tower.valid, tower.order
    by_token = None if tower.raster is None or tower.edited else _behind(tower.raster, adapter.tower_prefix)

    def read(name: str) -> Tensor:
        x = parts[name]
        x = x() if callable(x) else x
        if adapter.packed_tower:
            x = unpack(x, valid, views, order).transpose(1, 2)
        return x if by_token is None else x[:, :, by_token]

    return read


def _back_to_grid(vision: Vision, adapter: Adapter):
    """Hook of the feature layer: put what the tower left back in its places, zeros where nothing is.

    For models that lay the tower's output out as a picture before they join its patches.
    """

    def hook(module: nn.Module, args: tuple, output):
        tower = vision.tower
        assert tower is not None and tower.raster is not None
        tower.on_grid = True
        if not tower.edited:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        prefix, cells = adapter.tower_prefix, len(tower.raster)
        rows = hidden[:, prefix:]
        place = torch.arange(rows.shape[1], device=rows.device).expand_as(tower.ids) if tower.leading else tower.ids
        target = tower.raster[place]
        if tower.valid is not None:
            target = target.masked_fill(~tower.valid, cells)  # padding lands in one spare row
        full = rows.new_zeros(len(rows), cells + 1, rows.shape[-1])
        full = full.scatter(1, target[..., None].expand_as(rows), rows)
        full = torch.cat([hidden[:, :prefix], full[:, :-1]], dim=1)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    return hook


def _behind(order: Tensor, prefix: int) -> Tensor:
    """``order`` of patches with the ``prefix`` special tokens left in front."""
    return torch.cat([torch.arange(prefix, device=order.device), order + prefix])


def _tap(taps: dict[str, Any], name: str):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        taps[name] = output

    return hook


def _before(vision: Vision, index: int, adapter: Adapter, args: tuple, kwargs: dict):
    """Count the tokens; in a packed tower, also give the layer the arguments of those that are left."""
    tower = vision.tower
    assert tower is not None
    hidden = args[0] if args else kwargs["hidden_states"]
    if adapter.packed_tower:
        counts = segments(tower, index not in adapter.global_layers)
        tower.tokens.append(len(hidden))
        tower.view_tokens.append(counts.sum(1))
        tower.view_pairs.append(counts.square().sum(1))
        if not tower.edited:
            return None
        return args, adapter.tower_arguments(kwargs, present_rows(tower), counts[counts > 0])
    views, n = hidden.shape[:2]
    # where views are padded to the longest, each counts what it holds, as it would alone
    padded = tower.valid is not None and not tower.on_grid and views == len(vision.layout.view_image)
    tower.tokens.append(views * n)
    tower.view_tokens.append(adapter.tower_prefix + tower.valid.sum(1) if padded else None)
    tower.views.append(views)
    return None


def _masked(vision: Vision, adapter: Adapter, args: tuple, kwargs: dict):
    """Give attention the key bias of padded or merged patches in the place of the stock mask."""
    tower = vision.tower
    assert tower is not None
    if tower.on_grid or not tower.edited:
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    bias = _key_bias(tower, adapter.tower_prefix)
    mask = None
    if bias is not None:
        mask = bias[:, None, None, :].to(hidden.dtype).clamp_min(torch.finfo(hidden.dtype).min)
    return adapter.masked_arguments(args, kwargs, mask)


def _key_bias(tower: TowerState, prefix: int) -> Tensor | None:
    """[V, prefix + n] additive key bias in fp32, or None."""
    if tower.bias is None and tower.valid is None:
        return None
    bias = torch.zeros_like(tower.ids, dtype=torch.float32) if tower.bias is None else tower.bias
    if tower.valid is not None:
        bias = bias.masked_fill(~tower.valid, torch.finfo(torch.float32).min)
    return torch.nn.functional.pad(bias, (prefix, 0))


def _call(
    vision: Vision,
    index: int,
    hidden: Tensor,
    projected: Callable[[str], Tensor],
    callers: list[Method],
    adapter: Adapter,
) -> Tensor | None:
    tower, edited = vision.tower, False
    assert tower is not None
    prefix = adapter.tower_prefix
    for method in callers:
        layer = TowerLayer(
            index=index, depth=len(adapter.tower_layers), feature_layer=adapter.feature_layer, hidden=hidden,
            scale=adapter.tower_scale, prefix=prefix, has_cls=adapter.has_cls, ids=tower.ids, valid=tower.valid,
            bias=_key_bias(tower, prefix), layout=vision.layout, group=tower.group,
            whole_tokens=adapter.whole_tokens, global_layers=adapter.global_layers,
            native=adapter.packed_tower, frames=tower.frames, alive=tower.alive,
            _projected=under_autocast(projected, hidden.device),
            _following=under_autocast(lambda hidden=hidden: _next_cls_logits(index, hidden, adapter), hidden.device),
        )  # fmt: skip
        with own_precision(hidden.device):
            edit = method.tower(layer, vision.state(method))
        if edit is not None:
            if edit.leading and adapter.whole_tokens:
                raise ValueError(
                    f"'{method.name}' lets patches of different tokens be joined, which this family's tower cannot take."
                )
            if vision.layout.pooling is not None:
                raise ValueError(POOLED.format(f"'{method.name}'"))
            shallow = min(adapter.feature_layers, default=index)
            if shallow < index:
                raise ValueError(
                    f"'{method.name}' changes the patches behind vision layer {index}, and this model feeds the output of "
                    f"vision layer {shallow} too, whose patches would not fit; use a method that acts behind the tower "
                    "(vtc-cls, grid, ...)."
                )
            assert edit.joined is None or adapter.joins_views
            hidden = _apply(tower, edit, hidden, prefix)
            edited = True
    return hidden if edited else None


def _next_cls_logits(index: int, hidden: Tensor, adapter: Adapter) -> Tensor:
    """[V, n] fp32 logits of the CLS query in the layer behind ``index``, from its input ``hidden``; mean over heads."""
    norm, linear = adapter.tower_norm(index + 1), adapter.tower_projections(index + 1)
    heads, prefix = adapter.tower_heads, adapter.tower_prefix
    plain = type(norm) is nn.LayerNorm and all(_holds_numbers(linear[name]) for name in ("q", "k"))
    # weights of an offloaded model, or of one on several devices, are where they belong only while their module runs
    plain = plain and norm.weight.device == linear["q"].weight.device == hidden.device
    if plain and not adapter.tower_qk_norm:
        weight, bias = (None if p is None else p.float() for p in (norm.weight, norm.bias))
        x = nn.functional.layer_norm(hidden.float(), norm.normalized_shape, weight, bias, norm.eps)
        parts = [None if p is None else p.float() for m in ("q", "k") for p in (linear[m].weight, linear[m].bias)]
        with own_precision(hidden.device):
            return folded_cls_logits(x, *parts, heads, adapter.tower_scale)[:, prefix - 1 :]
    # quantised, adapted, normed or absent weights: call the modules as they are
    x = norm(hidden)
    k = linear["k"](x[:, prefix:])
    q, k, _ = adapter.split_qkv(index + 1, {"q": linear["q"](x[:, :1]), "k": k, "v": k})
    with own_precision(q.device):
        logits = torch.einsum("vhd,vhnd->vn", q[:, :, 0].float(), k.float()) * (adapter.tower_scale / heads)
    return logits.to(hidden.device)


def _holds_numbers(module: nn.Module) -> bool:
    """Whether this is a stock Linear with an ordinary weight: torchao leaves the module and exchanges the tensor."""
    return type(module) is nn.Linear and type(module.weight.data) is Tensor


def _apply(tower: TowerState, edit: TowerEdit, hidden: Tensor, prefix: int) -> Tensor:
    """Shorten the states and move the books along."""
    keep = edit.keep
    rows = edit.hidden
    if rows is None:
        patches = hidden[:, prefix:]
        rows = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
    if edit.owner is not None or tower.owner is not None:
        before = tower.owner if tower.owner is not None else places(tower.ids, tower.cells)
        local = edit.owner if edit.owner is not None else places(keep, tower.ids.shape[1])
        tower.owner = local.gather(1, before.clamp_min(0)).masked_fill(before < 0, -1)
    if edit.joined is None:
        tower.ids = tower.ids.gather(1, keep)
        tower.view = None if tower.view is None else tower.view.gather(1, keep)
    else:
        hidden = _join(tower, edit.joined, keep)
    tower.valid, tower.newlines, tower.leading, tower.flat = edit.valid, edit.newlines, edit.leading, edit.flat
    tower.order = order_of(tower.ids // tower.group, tower.valid, tower.window)
    tower.bias = (
        edit.bias if edit.bias is not None else (tower.bias.gather(1, keep) if tower.bias is not None else None)
    )
    tower.edited = True
    return torch.cat([hidden[:, :prefix], rows.to(hidden.dtype)], dim=1)


def _join(tower: TowerState, joined: Joined, keep: Tensor) -> Tensor:
    """Move the books to joined views; returns their special tokens."""
    before = torch.arange(len(tower.ids), device=keep.device)[:, None].expand_as(tower.ids)
    before = before if tower.view is None else tower.view
    tower.view, tower.ids = before[joined.view, keep], tower.ids[joined.view, keep]
    tower.frames, tower.alive = joined.frames, joined.alive
    return joined.special


def places(ids: Tensor, width: int) -> Tensor:
    """[V, width] place in ``ids`` [V, n] of every number below ``width``, -1 where it does not occur."""
    order = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.full((len(ids), width), -1, dtype=torch.long, device=ids.device).scatter(1, ids, order)
