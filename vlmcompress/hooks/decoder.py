# SPDX-License-Identifier: Apache-2.0
"""The language model's side: the frame that enters it, the cuts between its layers, and the way back to the caller's
sequence length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..compat import cache_keyword, cache_of, checkpoints
from ..dtypes import LongTensor
from ..ops.places import put
from ..tokens import Frame, pack
from .cache import lead, managed
from .masks import joined_mask
from .run import Run, chunk_of
from .takeover import flat_mask, manage

if TYPE_CHECKING:
    from ..adapters.base import Adapter


def _own_cache(kwargs: dict[str, Any], adapter: Adapter) -> Cache | None:
    """The cache that the language model would make for itself in this call, made ahead so that it can be managed."""
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = adapter.text_config.use_cache
    return DynamicCache(config=adapter.text_config) if use_cache and not checkpoints(adapter.language_model) else None


def enter(
    run: Run, kwargs: dict[str, Any], adapter: Adapter, positions: str, layerwise: bool, given: dict[str, Any]
) -> dict[str, Any] | None:
    """Build the first frame and the language model's arguments for it; None leaves the stock call alone.

    ``positions``: "original" or "contiguous" for the cut at ENTRY. ``layerwise``: methods act inside the decoder or on
    its cache, so that layers may differ. ``given``: the arguments of the model around the language model.
    """
    embeds, run.cache = kwargs["inputs_embeds"], cache_of(kwargs)
    if run.layout is None and not managed(run.cache) and not layerwise:
        return None
    if run.cache is None and (run.layout is not None or layerwise):
        run.cache = _own_cache(kwargs, adapter)
    attention_mask = open_frame(run, kwargs, adapter, given, positions, layerwise)
    frame, dropping = run.frame, run.selection is not None
    if run.cache is not None and (dropping or layerwise):
        take_over(run, adapter, attention_mask)
    run.entry_positions = frame.positions
    if not dropping and not managed(run.cache):
        return None
    kwargs = dict(kwargs)
    if managed(run.cache):
        kwargs[cache_keyword(adapter.language_model)] = run.cache
        lead(run.cache)
    if dropping:
        embeds = _with_replaced(run, embeds)
        kept = embeds.gather(1, _carried(run)[..., None].expand(-1, -1, embeds.shape[-1]))
        # padding slots point at dropped columns, which hold NaN
        kwargs["inputs_embeds"] = kept if frame.valid is None else kept.masked_fill(~frame.valid[..., None], 0)
        adapter.follow(kwargs, frame.index)
    kwargs["position_ids"] = run.entry_positions = shifted(frame.positions, _past_shift(run))
    mask = _entry_mask(run, attention_mask, dropping)
    kwargs["attention_mask"] = adapter.language_mask(mask, kwargs, frame, given)
    return kwargs


def open_frame(
    run: Run, kwargs: dict[str, Any], adapter: Adapter, given: dict[str, Any], positions: str, layerwise: bool = False
) -> Tensor | None:
    """Fill in what a run knows of the caller's chunk, and its first frame; returns the caller's 2-D mask."""
    embeds = kwargs["inputs_embeds"]
    run.columns = embeds.shape[1]
    attention_mask = flat_mask(adapter.caller_mask(kwargs, given), run.cache, run.columns)
    run.chunk_valid = chunk_of(attention_mask, run.columns)
    if layerwise and run.columns > 1 and run.chunk_valid is not None and bool(run.chunk_valid.all()):
        # one look from the host per prompt spares every later step the books of padding that is not there
        run.chunk_valid = None
    run.base_positions = _base_positions(kwargs.get("position_ids"), run, embeds)
    run.frames = [_first_frame(run, embeds, positions, adapter.mrope)]
    return attention_mask


def _with_replaced(run: Run, embeds: Tensor) -> Tensor:
    """``embeds`` [B, S, D] with the vectors that methods put in the place of tokens."""
    for row, column, vectors in run.replaced:
        embeds = embeds.index_put((row, column), vectors.to(embeds))
    return embeds


def _carried(run: Run) -> LongTensor:
    """[B, S'] column whose embedding stands in each slot of the first frame."""
    selection, layout = run.selection, run.layout
    assert selection is not None and layout is not None
    if selection.copies is None:
        return run.frame.index
    own, carried = (layout.column.gather(1, which) for which in (selection.keep, selection.copies))
    column = torch.arange(run.columns, device=own.device).repeat(len(run.frame.index), 1)
    return put(column, layout.batch_index, own, selection.real, carried).gather(1, run.frame.index)


def _past_shift(run: Run) -> LongTensor | None:
    return run.cache.layers[0].shift if managed(run.cache) else None


def shifted(positions: LongTensor, shift: LongTensor | None) -> LongTensor:
    """Positions [.., B, S] less what earlier chunks took off ([B])."""
    return positions if shift is None else positions - shift[:, None]


def _base_positions(position_ids: LongTensor | None, run: Run, embeds: Tensor) -> LongTensor:
    """The caller's positions of this chunk, [B, S] or [axes, B, S]."""
    batch, columns = embeds.shape[:2]
    if position_ids is None:
        seen = run.cache.get_seq_length() if run.cache is not None else 0
        position_ids = torch.arange(seen, seen + columns, device=embeds.device)[None]
    return position_ids.expand(*position_ids.shape[:-2], batch, columns)


def take_over(run: Run, adapter: Adapter, attention_mask: Tensor | None) -> None:
    """Put layers of ours into the run's cache, with what it holds already."""
    fresh = not managed(run.cache)
    past = run.cache.get_seq_length() if fresh else 0
    manage(run.cache, len(adapter.decoder_layers))
    if fresh and past and attention_mask is not None:
        for layer in run.cache.layers:
            layer.valid = attention_mask[:, :past].bool()[:, None, past - layer.stored :]


def _entry_mask(run: Run, attention_mask: Tensor | None, dropping: bool) -> Tensor | None:
    """The 2-D mask for the stock mask builder."""
    frame = run.frame
    batch, slots = frame.index.shape
    past, past_valid, offset = 0, None, 0
    if managed(run.cache) and run.cache.get_seq_length():
        # a sliding layer has forgotten what lies behind its window
        layer = next((x for x in run.cache.layers if not hasattr(x, "sliding_window")), run.cache.layers[0])
        past, offset = layer.stored, layer.dropped
        if hasattr(layer, "sliding_window"):
            offset += layer.cumulative_length - past
        past_valid = None if layer.valid is None else layer.valid[:, 0]
    elif not dropping:
        return attention_mask
    mask = joined_mask(past, past_valid, frame.valid, offset, (batch, slots, frame.index.device))
    room = getattr(run.cache.layers[0], "max_cache_len", 0) if managed(run.cache) else 0
    if mask is not None and room:
        # always of one length, so that a compiled step stays as it is; nobody sees what is not there yet
        mask = torch.nn.functional.pad(mask, (0, room - past - slots), value=True)
    if mask is None and run.cache is None:
        # gaps in the positions would be taken for packed sequences if there were neither mask nor cache
        mask = torch.ones(batch, slots, dtype=torch.bool, device=frame.index.device)
    return mask


def _first_frame(run: Run, embeds: Tensor, positions: str, mrope: bool) -> Frame:
    batch, columns = embeds.shape[:2]
    device, base = embeds.device, run.base_positions
    assert base is not None
    here = torch.arange(columns, device=device).expand(batch, -1)
    image = torch.full((batch, columns), -1, dtype=torch.long, device=device)
    layout, selection = run.layout, run.selection
    if layout is None:
        return Frame(here, run.chunk_valid if columns > 1 else None, image, [], base, here[:0, 0])
    rows = layout.batch_index
    image = put(image, rows, layout.column, layout.valid, torch.arange(len(layout), device=device)[:, None])
    if selection is None:
        return Frame(here, run.chunk_valid, image, list(layout.n), base, rows[:, 0])

    real = selection.real
    fed = layout.column.gather(1, selection.keep)  # [I, k_max] columns in feeding order
    text = image < 0
    if run.chunk_valid is not None:
        text = text & run.chunk_valid
    keep = put(text, rows, fed, real, real)
    # the j-th fed token takes the place of the j-th kept column
    order = fed.masked_fill(~real, columns).sort(dim=1).values
    rank = put(here + 1, rows, fed, real, order + 1)
    if run.chunk_valid is None:
        lengths = [columns] * batch
        for sample, before, after in zip(layout.sample, layout.n, selection.counts, strict=True):
            lengths[sample] += after - before
    else:
        lengths = keep.sum(1).tolist()
    longest = max(lengths)
    index, valid = pack(keep, longest, rank)
    ragged = min(lengths) < longest
    in_place, _ = pack(keep, longest)
    dropped = (image >= 0) & ~keep
    if positions == "original":
        new, total = _pick(base, index), None
    else:
        closed = contiguous(base, dropped, keep, mrope)
        new, total = _pick(closed, in_place), _lost(base, closed, dropped, keep, mrope)
    return Frame(
        index, valid if ragged else None, image.gather(1, index), list(selection.counts), new, rows[:, 0], total
    )


def contiguous(positions: LongTensor, dropped: Tensor, keep: Tensor, mrope: bool) -> LongTensor:
    """Close the gaps that ``dropped`` slots leave: [.., B, S] positions, meaningful where ``keep``."""
    if not mrope:
        return positions - (dropped.cumsum(1) - dropped.long())
    first = (keep | dropped).int().argmax(1, keepdim=True)
    return _pick(positions, first) + (keep.cumsum(1) - 1).clamp_min(0)


def _lost(positions: LongTensor, closed: LongTensor, dropped: Tensor, keep: Tensor, mrope: bool) -> LongTensor:
    """[B] how far the positions behind this chunk move up when its gaps are ``closed``."""
    if not mrope:
        return dropped.sum(1)
    # a model of three axes goes on behind the largest position of any; a fourth axis in front counts text tokens only
    axes = positions[-3:] if positions.ndim == 3 else positions[None]
    largest = axes.masked_fill(~(keep | dropped), -1).amax((0, 2))
    last = keep.shape[1] - 1 - keep.flip(1).int().argmax(1, keepdim=True)
    return largest - (closed[-1] if closed.ndim == 3 else closed).gather(1, last)[:, 0]


def _pick(positions: LongTensor, index: LongTensor) -> LongTensor:
    return positions.gather(-1, index.expand(*positions.shape[:-1], -1))


def cut(run: Run, mask: Tensor, counts: list[int], layer: int, positions: str, mrope: bool) -> Frame | None:
    """The frame after a PREFILL cut behind decoder layer ``layer``; None when nothing leaves.

    ``mask`` [B, S_f]: slots that go on; ``counts``: visual tokens that go on, per image.
    """
    frame = run.frame
    if counts == frame.counts:
        return None
    layout = run.layout
    assert layout is not None
    keep = mask if frame.valid is None else mask & frame.valid
    batch, slots = mask.shape
    if frame.valid is None:
        gone = [0] * batch
        for sample, before, after in zip(layout.sample, frame.counts, counts, strict=True):
            gone[sample] += before - after
        lengths = [slots - g for g in gone]
    else:
        lengths = keep.sum(1).tolist()
    longest = max(lengths)
    select, valid = pack(keep, longest)
    dropped = frame.visual & ~keep
    if positions == "original":
        new, total = _pick(frame.positions, select), frame.total_shift
    else:
        closed = contiguous(frame.positions, dropped, keep, mrope)
        new = _pick(closed, select)
        lost = _lost(frame.positions, closed, dropped, keep, mrope)
        total = lost if frame.total_shift is None else frame.total_shift + lost
    ragged = len(set(lengths)) > 1
    return Frame(
        frame.index.gather(1, select), valid if ragged else None, frame.image.gather(1, select), list(counts), new,
        frame.image_row, total, first_layer=layer + 1,
    )  # fmt: skip


def restore_length(run: Run, hidden: Tensor) -> Tensor:
    """[B, S_f, D] of the last frame → [B, S, D] of the caller's chunk, zeros where tokens left.

    The caller's last real column always holds the state of the last token that stayed: where a prompt ends with an
    image, the next token is predicted from there.
    """
    frame = run.frame
    batch = torch.arange(len(hidden), device=hidden.device)
    newest = hidden[batch, frame.last]
    if frame.valid is not None:
        hidden = hidden.masked_fill(~frame.valid[..., None], 0)
    out = hidden.new_zeros(hidden.shape[0], run.columns, hidden.shape[2])
    out = out.scatter(1, frame.index[..., None].expand_as(hidden), hidden)
    if run.chunk_valid is None:
        end = torch.full_like(batch, run.columns - 1)
    else:
        end = run.columns - 1 - run.chunk_valid.flip(1).int().argmax(1)
    return out.index_put((batch, end), newest)


def dropped_columns(run: Run) -> Tensor:
    """[B, S] bool: columns of the caller's chunk whose output is zero because their visual token left."""
    frame = run.frame
    out = torch.zeros(frame.index.shape[0], run.columns, dtype=torch.bool, device=frame.index.device)
    layout = run.layout
    assert layout is not None
    out = put(out, layout.batch_index, layout.column, layout.valid, layout.valid)
    alive = torch.zeros_like(out).scatter(1, frame.index, frame.visual)
    return out & ~alive


def blank_labels(labels: Tensor, dropped: Tensor, items: Tensor | None = None) -> None:
    """Ignore the labels of dropped positions and those that a dropped position would have to predict.

    ``items``: the number of labels, in all batches that share one step, by which the loss is divided; it shrinks as the
    labels of this batch do.
    """
    before = (labels != -100).sum()
    labels.masked_fill_(dropped.to(labels.device), -100)
    predicted = torch.nn.functional.pad(dropped, (1, 0))[:, :-1]
    labels.masked_fill_(predicted.to(labels.device), -100)
    if items is not None:
        left = (labels != -100).sum()
        items.mul_(torch.where(left > 0, left / before.clamp_min(1), 1.0))
