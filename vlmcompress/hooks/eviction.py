# SPDX-License-Identifier: Apache-2.0
"""CACHE: what methods see of one decoder layer's cache, before and after it runs, and how their answers are followed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..ops.scores import causal_logits
from ..views import AttendLayer, CacheLayer, Eviction
from .attention import keys, queries
from .cache import PrunableLayer, picks
from .decoder import shifted
from .precision import own_precision, under_autocast
from .run import Run

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..method import Method


def hand_over(store: PrunableLayer, method: Method) -> None:
    """Give the books of ``store`` to ``method``: what another one has noted there means nothing to it."""
    owner = store.memory.get("owner")
    if owner is method:
        return
    if owner is not None and owner != method:
        visual = store.books.get("visual")
        store.books, store.memory = {} if visual is None else {"visual": visual}, {}
        store.book_rooms.clear()
        store.hidden, store.blind = None, False
    store.memory["owner"] = method


def choose_entries(run: Run, index: int, hidden: Tensor, methods: list[Method], adapter: Adapter) -> None:
    """Before a decoder layer runs: let the methods say which of its older entries the new tokens ``hidden`` shall see."""
    store = run.cache.layers[index]
    if not isinstance(store, PrunableLayer) or not store.stored:
        return
    for method in methods:
        hand_over(store, method)
    layer, frame = adapter.decoder_layers[index], run.frame

    def query(positions: LongTensor | None) -> Tensor:
        if positions is None:
            positions = shifted(frame.positions, store.shift)
        else:
            positions = positions.expand(*frame.positions.shape[:-2], len(hidden), -1)
        return queries(layer, hidden, adapter.one_table(adapter.rotary(hidden, positions)))

    view = AttendLayer(
        index=index, depth=len(adapter.decoder_layers), keys=store.keys, valid=store.valid, new=hidden.shape[1],
        new_valid=frame.valid, books=store.books, memory=store.memory, _query=under_autocast(query, hidden.device),
    )  # fmt: skip
    for method in methods:
        with own_precision(hidden.device):
            chosen = method.attend(view, run.state(method))
        if chosen is not None:
            store.selected = chosen


def shown(store: PrunableLayer) -> tuple[int, Tensor | None]:
    """How many older entries the next tokens see of ``store``, and which of them are real ([B, 1 or H_kv, n] or None)."""
    visible = store.visible
    if store.selected is None:
        return store.stored, visible
    return store.selected.shape[2], None if visible is None else picks(visible, store.selected)


def evict(run: Run, index: int, inputs: Tensor, embeddings, method: Method, adapter: Adapter, positions: str) -> None:
    """After a decoder layer has run on ``inputs`` [B, S_f, D]: let ``method`` choose what stays in its cache."""
    store = run.cache.layers[index]
    if not isinstance(store, PrunableLayer):
        return
    hand_over(store, method)
    new, layer = inputs.shape[1], adapter.decoder_layers[index]
    cos, sin = (table.expand(len(inputs), -1, -1) for table in embeddings)
    attention, state = layer.self_attn, run.state(method)

    def spend(flops: int) -> None:
        state["flops"] = state.get("flops", 0) + flops

    def logits(rows: LongTensor, upto: int | None) -> Tensor:
        if new == 1:
            picked, tables = inputs, (cos, sin)
        else:
            at = rows.clamp_min(0)[..., None]
            picked = inputs.gather(1, at.expand(-1, -1, inputs.shape[-1]))
            tables = tuple(t.gather(1, at.expand(-1, -1, t.shape[-1])) for t in (cos, sin))
        seen, held = store.visible, store.keys
        if upto is not None:
            held, seen = held[:, :, :upto], None if seen is None else seen[..., :upto]
        # the newest token sees all that is real
        seen_up_to = None if new == 1 and seen is None else torch.where(rows < 0, -1, rows + store.stored - new)
        projected = run.projected.get(index) if new == 1 else None
        projecting = inputs.shape[-1] if projected is None else 0
        spend(2 * rows.numel() * attention.q_proj.out_features * (projecting + held.shape[2]))
        asking = queries(layer, picked, tables, projected)
        with own_precision(asking.device):
            return causal_logits(asking, held, seen_up_to, attention.scaling, seen)

    def unrotated() -> Tensor:
        # projected anew: turning the cached keys back would leave equal tokens with keys that differ in the last bits
        spend(2 * inputs.numel() * attention.k_proj.out_features)
        return keys(layer, inputs, (torch.ones_like(cos), torch.zeros_like(sin)))

    heads = attention.q_proj.out_features // attention.k_proj.out_features
    view = CacheLayer(
        index=index, depth=len(adapter.decoder_layers), keys=store.keys, values=store.values, valid=store.valid,
        new=new, prefill=run.layout is not None or new > 1, visual=store.books.get("visual"), groups=heads,
        books=store.books, memory=store.memory, _logits=under_autocast(logits, inputs.device),
        _unrotated=under_autocast(unrotated, inputs.device),
    )  # fmt: skip
    with own_precision(inputs.device):
        answer = method.cache(view, state)
    apply(run, index, answer, positions)


def settle(run: Run, methods: list[Method], adapter: Adapter, policies: Mapping[int, str]) -> None:
    """Let the methods evict once more when the whole prompt has passed through every layer."""
    if not methods:
        return
    final = run.frame
    real = torch.ones_like(final.index, dtype=torch.bool) if final.valid is None else final.valid
    alive = torch.zeros(len(real), run.columns, dtype=torch.bool, device=real.device).scatter(1, final.index, real)
    for index, store in enumerate(run.cache.layers):
        if not isinstance(store, PrunableLayer) or index in run.evicted:
            continue
        frame = [f for f in run.frames if f.first_layer <= index][-1]
        past = store.stored - frame.index.shape[1]
        reached = alive.gather(1, frame.index)
        if frame.valid is not None:
            reached &= frame.valid
        view = CacheLayer(
            index=index, depth=len(adapter.decoder_layers), keys=store.keys, values=store.values, valid=store.valid,
            new=frame.index.shape[1], prefill=True, visual=store.books.get("visual"), groups=1, books=store.books,
            memory=store.memory, _logits=_no_attention, _unrotated=_no_attention,
            reached=torch.nn.functional.pad(reached, (past, 0), value=True),
        )  # fmt: skip
        for method in methods:
            with own_precision(store.keys.device):
                answer = method.settle(view, run.state(method))
            apply(run, index, answer, policies[id(method)])


def _no_attention(*_) -> Tensor:
    raise ValueError("Attention rows can be asked for while a layer runs, not after the prompt.")


def apply(run: Run, index: int, eviction: Eviction | None, positions: str) -> None:
    """Follow a method's answer in the cache of decoder layer ``index``."""
    if eviction is None:
        return
    store = run.cache.layers[index]
    if eviction.hide is not None:
        store.hidden, store.blind = eviction.hide, eviction.blind
    if eviction.keep is None:
        return
    store.evict(eviction.keep, eviction.valid)
    run.evicted.add(index)
    if eviction.shift is not None and positions == "contiguous":
        store.shift = eviction.shift if store.shift is None else store.shift + eviction.shift
