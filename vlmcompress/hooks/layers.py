# SPDX-License-Identifier: Apache-2.0
"""PREFILL and CACHE: hooks on the decoder's layers, there only while a method acts inside the language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..dtypes import LongTensor
from ..tokens import Frame
from ..views import PrefillLayer
from .answers import checked_cut
from .attention import rows_cost, rows_of, values
from .cache import PrunableLayer, managed
from .decoder import cut, shifted
from .eviction import choose_entries, evict, shown
from .masks import layer_mask
from .precision import own_precision, under_autocast
from .run import Run

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..method import Method

CROP_REFUSED = (
    "Assisted decoding takes back tokens from the cache, but a method has already used its drafts to choose what stays; "
    "use a method that finishes before the language model (vtc-cls, grid, ...) or plain decoding."
)


def before_layer(
    run: Run, index: int, hidden: Tensor, kwargs: dict[str, Any], adapter: Adapter, choosers: list[Method]
) -> dict[str, Any]:
    """Give one layer the mask, positions and rotary tables of the frame and the cache that it works on.

    ``choosers``: methods that say which entries of the cache the new tokens see.
    """
    frame = run.frame
    store = run.cache.layers[index] if managed(run.cache) else None
    if store is not None and choosers:
        choose_entries(run, index, hidden, choosers, adapter)
    if (
        frame is not run.frames[0]
        or uneven(run, adapter)
        or (isinstance(store, PrunableLayer) and store.selected is not None)
    ):
        past, past_valid = (0, None) if store is None else (store.stored, store.valid)
        if isinstance(store, PrunableLayer):
            past, past_valid = shown(store)
        shift = None if store is None else store.shift
        key = (id(frame), past, id(past_valid), id(shift))
        if key not in run.prepared:
            positions = shifted(frame.positions, shift)
            blind = isinstance(store, PrunableLayer) and store.blind
            mask = layer_mask(past, past_valid, frame.valid, hidden, adapter.text_config, blind=blind)
            # the tensors whose ids make up the key are kept with it, so that no id is used twice
            run.prepared[key] = (mask, positions, adapter.rotary(hidden, positions), (past_valid, shift))
        mask, positions, embeddings, _ = run.prepared[key]
        kwargs = {**kwargs, "attention_mask": mask, "position_embeddings": embeddings}
        if "position_ids" in kwargs:
            kwargs["position_ids"] = adapter.layer_positions(positions)
    run.layer_inputs[index] = (hidden, adapter.one_table(kwargs["position_embeddings"]))
    return kwargs


def uneven(run: Run, adapter: Adapter) -> bool:
    """Whether the cache's layers hold different entries, so that one mask and one set of positions cannot serve all."""
    if "uneven" not in run.prepared:
        run.prepared["uneven"] = managed(run.cache) and _differ(run.cache.layers, run.frame, adapter)
    return run.prepared["uneven"]


def _differ(layers: list[Any], frame: Frame, adapter: Adapter) -> bool:
    """Whether managed ``layers`` need masks or positions of their own for the tokens of ``frame``."""
    if any(layer.hidden is not None for layer in layers) or (
        layers[0].valid is not None and layers[0].valid.shape[1] > 1
    ):
        return True
    # one token behind entries that are all real sees all of them without a mask, however many a layer holds
    plain = frame.index.shape[1] == 1 and frame.valid is None and adapter.text_config._attn_implementation != "eager"
    plain = plain and all(isinstance(layer, PrunableLayer) and layer.valid is None for layer in layers)
    return len({(0 if plain else layer.stored, id(layer.valid), id(layer.shift)) for layer in layers}) > 1


def after_layer(
    run: Run, index: int, hidden: Tensor, prefill: list[Method], cachers: list[Method], adapter: Adapter,
    policies: Mapping[int, str],
) -> Tensor | None:  # fmt: skip
    """Let the methods act behind one layer; returns the changed states, or None when nothing left."""
    inputs, embeddings = run.layer_inputs.pop(index)
    frame = run.frame
    if managed(run.cache):
        store = run.cache.layers[index]
        store.commit(frame, run.columns, modality=bool(cachers))
        run.committed.add(index)
        store.refuse_crop = CROP_REFUSED
        for method in cachers:
            evict(run, index, inputs, embeddings, method, adapter, policies[id(method)])
    if run.layout is None:
        return None
    changed = run.with_injected(index, hidden)
    hidden = hidden if changed is None else changed
    for method in prefill:
        view = prefill_view(run, index, hidden, inputs, embeddings, adapter)
        with own_precision(hidden.device):
            answer = checked_cut(method.prefill(view, run.state(method)), run.frame, method)
        if answer is None:
            continue
        frame = cut(run, answer.mask, answer.counts, index, policies[id(method)], adapter.mrope)
        if frame is None:
            continue
        hidden = changed = _follow(hidden, run.frame.index, frame.index, run.columns)
        run.frames.append(frame)
    return changed


def _follow(hidden: Tensor, before: LongTensor, after: LongTensor, columns: int) -> Tensor:
    """Gather the states of slots ``before`` [B, S] (caller's columns) that stand in ``after`` [B, S']."""
    slot = torch.arange(before.shape[1], device=before.device).expand_as(before)
    where = torch.zeros(len(before), columns, dtype=torch.long, device=before.device).scatter(1, before, slot)
    return hidden.gather(1, where.gather(1, after)[..., None].expand(-1, -1, hidden.shape[-1]))


def prefill_view(run: Run, index: int, hidden: Tensor, inputs: Tensor, embeddings, adapter: Adapter) -> PrefillLayer:
    """What a method sees of decoder layer ``index`` with its ``inputs`` and output ``hidden`` [B, S_f, D].

    Index -1 with the embeddings for both: no layer has run yet, and only the following one can be asked.
    """
    frame, layers, own = run.frame, adapter.decoder_layers, inputs.shape[1]

    def cached_keys(following: bool) -> Tensor | None:
        """Keys in the cache of this layer (those of the chunk last) or of the next (earlier chunks only)."""
        if not managed(run.cache) or (index in run.evicted and not following):
            return None
        return run.cache.layers[index + following].keys

    def attention(rows: LongTensor, following: bool) -> Tensor:
        layer, states = layers[index + following], hidden if following else inputs
        stored, past, mine = cached_keys(following), None, None
        if stored is not None and not following:
            stored, mine = stored[:, :, :-own], stored[:, :, -own:]
        if stored is not None and stored.ndim == 4 and stored.shape[2]:
            real = run.cache.layers[index + following].valid
            past = (stored, None if real is None else real[..., : stored.shape[2]].any(1))
        return rows_of(layer, states, embeddings, rows, frame.valid, mine, past)

    def cost(rows: LongTensor, following: bool) -> int:
        return rows_cost(layers[index + following], inputs, rows, following or cached_keys(False) is None)

    def own_values() -> tuple[Tensor, int]:
        if cached_keys(False) is not None:
            return run.cache.layers[index].values[:, :, -own:], 0
        projected = values(layers[index], inputs)
        return projected, 2 * projected.numel() * inputs.shape[-1]

    assert run.layout is not None
    rows, value_states = (under_autocast(ask, hidden.device) for ask in (attention, own_values))
    return PrefillLayer(index, len(layers), hidden, frame, run.layout, rows, value_states, cost)


def watch_parts(
    layer: nn.Module, index: int, method: Method, watched: Callable[[], Run | None], wrap: Callable[[Any], Any]
) -> list[Any]:
    """Hooks that show ``method`` what goes in and out of a layer's attention and feed-forward block.

    ``watched``: the run to report to, None outside of one; ``wrap`` goes around every hook. Returns their handles.
    """

    @torch.no_grad()
    def show(part: str, inputs: Tensor, outputs: Tensor, run: Run) -> None:
        # scores learn nothing; and gradient checkpointing, which runs the parts again, must find the same saved tensors
        with own_precision(outputs.device):
            method.watch(index, part, inputs, outputs, run.state(method))

    def attention(module: nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        if (run := watched()) is not None:
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            show("attention", inputs, output[0], run)

    def mlp(module: nn.Module, args: tuple, output: Tensor) -> None:
        if (run := watched()) is not None:
            show("mlp", args[0], output, run)

    return [
        layer.get_submodule("self_attn").register_forward_hook(wrap(attention), with_kwargs=True),
        layer.get_submodule("mlp").register_forward_hook(wrap(mlp)),
    ]
