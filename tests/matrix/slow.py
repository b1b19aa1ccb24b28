# SPDX-License-Identifier: Apache-2.0
"""One cell against the slow reference: the same model on the full sequence, dropped tokens hidden by a mask, no cache.

Everything is in columns of the caller. What a token that entered carries (merged, pooled or as it was) stands in the
column whose place it took; everything behind that is recomputed here, positions included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from models import cached
from reference import real_slots
from reference_prefix import blocks_of
from reference_prefix import reference as prefix_reference
from stories import Inputs
from torch import Tensor
from watching import Call, Watch

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.dtypes import LongTensor

STEPS = 3
CLOSE = dict(atol=1e-4, rtol=1e-4)
#: how an answer is made
DECODINGS = ("greedy", "beams", "second turn")


@dataclass
class Stock:
    """What the uncompressed language model gets: embeddings [B, S, D], positions [.., B, S], and per layer [B, S, D] that
    is added behind it."""

    embeds: Tensor
    positions: LongTensor
    added: list[Tensor]


def stock_of(model: Any, inputs: Inputs) -> Stock:
    adapter, seen = adapter_for(model), {}
    hook = adapter.language_model.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True)
    model(**inputs)
    hook.remove()
    mask, added = inputs["attention_mask"], []
    if adapter.mrope:
        positions = seen["position_ids"][-3:]
    else:
        positions = (mask.cumsum(1) - 1).clamp_min(0) + (model.config.model_type == "paligemma")
    for feature in seen.get("deepstack_visual_embeds") or []:
        table = torch.zeros_like(seen["inputs_embeds"])
        table[seen["visual_pos_masks"]] = feature
        added.append(table)
    return Stock(seen["inputs_embeds"], positions, added)


@dataclass
class Answer:
    """``sequences`` [B, S + T], ``logits`` by column of the token that they were read from, [B, V] each; ``rows[i]`` [B]:
    row of each sample in call i of the language model."""

    sequences: LongTensor
    logits: dict[int, Tensor] = field(default_factory=dict)
    rows: list[LongTensor] = field(default_factory=list)


def answer(model: Any, inputs: Inputs, decoding: str, special: tuple[int, ...]) -> Answer:
    options = dict(
        max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, suppress_tokens=list(special), output_logits=True,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    if decoding == "beams":
        options["num_beams"] = 2
    first = model.generate(**inputs, **options)
    batch, length = inputs["input_ids"].shape
    found, here = Answer(first.sequences), torch.arange(batch)
    for step, logits in enumerate(first.logits):
        rows = first.beam_indices[:, step] if decoding == "beams" else here
        found.logits[length + step - 1], found.rows = logits[rows], [*found.rows, rows]
    if decoding != "second turn":
        return found
    more = torch.randint(4, 80, (batch, 3), generator=torch.Generator().manual_seed(3))
    full = torch.cat([first.sequences, more], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, full.shape[1] - length), value=1)
    second = model.generate(input_ids=full, attention_mask=mask, **cached(first), **options)
    for step, logits in enumerate(second.logits):
        found.logits[full.shape[1] + step - 1], found.rows = logits, [*found.rows, here]
    found.sequences = second.sequences
    return found


@dataclass
class Told:
    """The run in columns of the caller: what entered and, per layer, what was added behind it, [B, S, D]; ``alive`` [B, S]:
    prompt tokens that a layer processed; ``seen`` [B, 1 or H_kv, L, L]: what each token saw there."""

    embeds: Tensor
    added: list[Tensor]
    positions: list[LongTensor]
    alive: list[Tensor]
    seen: list[Tensor]


def told(
    handle: vlmcompress.Handle, ledger: Any, stock: Stock, calls: list[Call], found: Answer, valid: Tensor
) -> Told:
    rows, length = found.rows[0], found.sequences.shape[1]
    first = ledger.frames[0]
    index, real = first.index[rows], real_slots(first)[rows]
    # padding slots point at columns that are not kept
    place = index.masked_fill(~real, valid.shape[1]).sort(dim=1).values
    order = torch.arange(place.shape[1]).expand_as(place)
    # padding stands in front of what entered, and behind it once sorted
    place = place.gather(1, (order - (~real).sum(1, keepdim=True)) % place.shape[1])
    at = torch.arange(len(rows))[:, None].expand_as(place)[real]

    def put(into: Tensor, slots: Tensor) -> Tensor:
        return into.index_put((at, place[real]), slots[rows][real])

    base = stock.positions.clone()
    base[..., at, place[real]] = stock.positions[..., at, index[real]]
    column = torch.zeros(len(rows), valid.shape[1], dtype=torch.long).scatter(
        1, index, place.clamp_max(valid.shape[1] - 1)
    )
    alive = []
    for layer in range(ledger.n_layers):
        frame = ledger.frame_at(layer)
        kept = real_slots(frame)[rows]
        table = torch.zeros(len(rows), valid.shape[1] + 1, dtype=torch.bool)
        places = column.gather(1, frame.index[rows]).masked_fill(~kept, valid.shape[1])
        alive.append(table.scatter(1, places, True)[:, :-1] & valid)
    seen = [shown(layer, alive[layer], calls, found, column, length) for layer in range(ledger.n_layers)]
    added = [put(torch.zeros_like(stock.embeds), slots) for slots in calls[0].added]
    return Told(
        put(stock.embeds, calls[0].embeds),
        added,
        positions(handle, base, stock.positions, alive, valid, length),
        alive,
        seen,
    )


def shown(layer: int, alive: Tensor, calls: list[Call], found: Answer, column: LongTensor, length: int) -> Tensor:
    """[B, 1 or H_kv, L, L] bool: what every token saw in one layer."""
    batch, prompt = alive.shape
    heads = max([1, *(call.past[layer].shape[1] for call in calls[1:] if call.past[layer] is not None)])
    entered = torch.nn.functional.pad(alive, (0, length - prompt), value=True)
    seen = entered[:, None, None].expand(-1, heads, length, -1).clone()
    for call, rows in zip(calls[1:], found.rows[1:], strict=True):
        past = call.past[layer]
        if past is None:
            continue
        old = past[rows].expand(-1, heads, -1)
        # the prompt's tokens stand where their vectors were put
        places = column[:, None].expand(-1, heads, -1)
        moved = torch.zeros(batch, heads, prompt, dtype=torch.int).scatter_add(2, places, old[..., :prompt].int())
        old = torch.cat([moved.bool(), old[..., prompt:]], 2)
        seen[:, :, call.offset : call.offset + call.columns, : call.offset] = old[:, :, None]
    return seen & torch.ones(length, length, dtype=torch.bool).tril()


def positions(handle, base: LongTensor, stock: LongTensor, alive: list[Tensor], valid: Tensor, length: int):
    """Per layer [.., B, L]: the uncompressed model's, closed up over what left where the method closes gaps."""
    wiring, steps = handle._wiring, torch.arange(length - valid.shape[1])
    last = stock.amax((0, 2)) if stock.ndim == 3 else stock.amax(1)
    later = (last[:, None] + 1 + steps).expand(*base.shape[:-1], -1)
    whole, found = torch.cat([base, later], -1), []
    inside = {wiring._policies[id(m)] for m in wiring._prefill} or {"original"}
    before = wiring.policy(wiring._before[0]) if wiring._before else "original"
    for mask in alive:
        moved = torch.zeros(len(valid), length, dtype=torch.long)
        for policy, gone in ((before, valid & ~alive[0]), (*inside, alive[0] & ~mask)):
            if policy == "contiguous":
                gone = torch.nn.functional.pad(gone, (0, len(steps))).long()
                moved += gone.cumsum(1) - gone
        found.append(whole - moved)
    return found


def logits_of(model: Any, told: Told, ids: LongTensor, inputs: Inputs) -> Tensor:
    """[B, L, V] logits of the whole conversation."""
    adapter, prompt, length = adapter_for(model), inputs["input_ids"].shape[1], ids.shape[1]
    if "token_type_ids" in inputs:
        blocks = blocks_of(model, inputs).masked_fill(~told.alive[0], -1)
        base = told.positions[0]
        return prefix_reference(model, told.embeds, told.alive[0], blocks, base[:, :prompt], later=ids[:, prompt:])
    text = adapter.language_model
    hidden = torch.cat([told.embeds, model.get_input_embeddings()(ids[:, prompt:])], 1)
    for number, layer in enumerate(text.layers):
        # a hidden token still sees itself, so that no row is empty
        seen = told.seen[number] | torch.eye(length, dtype=torch.bool)
        heads = text.config.num_attention_heads
        seen = seen if seen.shape[1] == 1 else seen.repeat_interleave(heads // seen.shape[1], dim=1)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        tables = text.rotary_emb(hidden, position_ids=told.positions[number])
        hidden = layer(hidden, attention_mask=mask, position_embeddings=tables)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if number < len(told.added):
            hidden = hidden + torch.nn.functional.pad(told.added[number], (0, 0, 0, length - prompt))
    return model.lm_head(text.norm(hidden))


@torch.no_grad()
def check(model: Any, method: str, options: dict, inputs: Inputs, decoding: str, special: tuple[int, ...]) -> None:
    """Raise ``AssertionError`` unless every logit of the answer is the reference's, ``ValueError`` where it is refused."""
    stock, valid = stock_of(model, inputs), inputs["attention_mask"].bool()
    with vlmcompress.compress(model, method, **options) as handle:
        watch = Watch(handle)
        try:
            found = answer(model, inputs, decoding, special)
        finally:
            watch.remove()
        ledger = handle.last
        run = told(handle, ledger, stock, watch.calls, found, valid)
    chosen = vlmcompress.Stage.TOWER not in vlmcompress.methods()[method].stages
    if chosen and (ledger.selection is None or (ledger.selection.owner is None and ledger.selection.copies is None)):
        for ours, theirs in zip([run.embeds, *run.added], [stock.embeds, *stock.added], strict=True):
            torch.testing.assert_close(ours[run.alive[0]], theirs[run.alive[0]], atol=1e-5, rtol=1e-5)
    expected = logits_of(model, run, found.sequences, inputs)
    for column, logits in found.logits.items():
        torch.testing.assert_close(logits, expected[:, column], **CLOSE)
    prompt = valid.shape[1]
    later = [seen[:, :, prompt:, :prompt] | ~valid[:, None, None] for seen in run.seen]
    # the cache of QuoTA's tiled images, and of what no cut has left behind, stays whole
    whole = method in ("none", "output-cache") or (method == "quota" and ledger.layout.thumbnail is not None)
    assert all(bool(seen.all()) for seen in later) == whole, "nothing was dropped, or all of it"
