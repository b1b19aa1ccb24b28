# SPDX-License-Identifier: Apache-2.0
"""CACHE: layers of the key-value cache that may hold fewer entries than the sequence has tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from ..dtypes import LongTensor
from ..tokens import Frame
from .growing import GrowingLayer, Room

STRANGER = (
    "This cache gave up tokens while the model was compressed, and the stock model would read it wrongly; go on with a "
    "compressed model, or start with a new cache."
)


class Logical:
    """What every kind of layer adds to its stock parent.

    The layer reports the *logical* length, as if nothing had left, so that generation, second turns and default
    positions stay right. ``dropped``: logical minus stored length. ``valid`` [B, 1 or H_kv, n] or None: real entries.
    ``shift`` [B] or None: what the position policy takes off the position of every later token. ``refuse_crop``: reason
    why the last entries cannot be taken back, or None.

    What a policy knows lives here too, so that it goes wherever the entries go: ``books`` hold a value per entry,
    [B, 1 or H_kv, n, ...] (new entries come in as zeros), ``memory`` holds whatever else; its tensors start with the
    batch. ``book_rooms``: storage of the books that hold vectors. ``hidden`` [B, 1 or H_kv, n] or None: entries that
    stay, but are not shown to the next tokens; ``blind``: a next token that comes alone does not see itself either.
    ``selected`` [B, 1, m] or None: older entries that the next tokens see, all others being left out of that one call.

    ``led``: a compressed model is at work on the layer. ``uneven``: other layers of the cache hold other numbers of
    entries. Both tell when a stock model would go on wrongly, which :meth:`check_led` refuses.
    """

    def start_books(self) -> None:
        self.dropped: int = 0
        self.valid: Tensor | None = None
        self.shift: LongTensor | None = None
        self.refuse_crop: str | None = None
        self.books: dict[str, Tensor] = {}
        self.book_rooms: dict[str, Room] = {}
        self.memory: dict[str, Any] = {}
        self.hidden: Tensor | None = None
        self.selected: LongTensor | None = None
        self.blind = self.led = self.uneven = False

    def check_led(self, new: int) -> None:
        """Raise ``ValueError`` when a stock model hands in ``new`` tokens behind entries that it cannot make sense of."""
        if self.led:
            return
        ragged = self.dropped and self.valid is not None
        if ragged or self.hidden is not None or self.shift is not None or (self.uneven and new > 1):
            raise ValueError(STRANGER)

    @property
    def visible(self) -> Tensor | None:
        """[B, 1 or H_kv, n] bool: entries that the next tokens may see; None for all."""
        if self.hidden is None:
            return self.valid
        return ~self.hidden if self.valid is None else self.valid & ~self.hidden

    def by_modality(self) -> tuple[Tensor, Tensor]:
        """([B], [B]) fp32: real entries of visual tokens and of text, averaged over heads."""
        visual = self.books.get("visual")
        real = torch.ones(*self.keys.shape[:3], device=self.keys.device)
        if self.valid is not None:
            real = real * self.valid
        seen = torch.zeros_like(real) if visual is None else real * visual
        return seen.sum(2).mean(1), (real - seen).sum(2).mean(1)

    def commit(self, frame: Frame, columns: int, modality: bool = False) -> None:
        """Enter in the books that ``columns`` tokens of the caller came in as the slots of ``frame``.

        ``modality``: note in ``books["visual"]`` which entries are those of visual tokens.
        """
        batch, slots = frame.index.shape
        self.led = False
        self.dropped += columns - slots
        if modality and frame.counts:
            length = self.stored
            visual = self.books.get("visual")
            if visual is None:
                visual = torch.zeros(batch, 1, length, dtype=torch.bool, device=self.keys.device)
            new = frame.visual[:, None].expand(-1, visual.shape[1], -1)
            self.books["visual"] = torch.cat([visual[..., : length - slots], new], dim=2)
        if frame.valid is not None:
            if self.valid is None:
                self.valid = torch.ones(batch, 1, self.stored, dtype=torch.bool, device=self.keys.device)
            self.valid = self.valid.clone()
            # a sliding layer holds no more than its window
            held = min(slots, self.valid.shape[-1])
            self.valid[..., self.valid.shape[-1] - held :] = frame.valid[:, None, slots - held :]
        if frame.total_shift is not None:
            self.shift = frame.total_shift if self.shift is None else self.shift + frame.total_shift

    def _per_batch(self, pick) -> None:
        self.valid = None if self.valid is None else pick(self.valid)
        self.shift = None if self.shift is None else pick(self.shift)
        self.hidden = None if self.hidden is None else pick(self.hidden)
        self.books = {name: pick(book) for name, book in self.books.items()}
        self.memory = {name: pick(x) if isinstance(x, torch.Tensor) else x for name, x in self.memory.items()}

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        new = key_states.shape[-2]
        self.check_led(new)
        if self.valid is not None:
            self.valid = torch.nn.functional.pad(self.valid, (0, new), value=True)
        if self.hidden is not None:
            self.hidden = torch.nn.functional.pad(self.hidden, (0, new), value=self.blind and new == 1)
        for name, book in self.books.items():
            entries = book.new_zeros(*book.shape[:2], new, *book.shape[3:])
            if new == 1 and book.ndim > 3:  # vectors, as large as the keys
                self.books[name] = self.book_rooms.setdefault(name, Room()).append(book, entries)
            else:
                self.book_rooms.pop(name, None)
                self.books[name] = torch.cat([book, entries], dim=2)
        return super().update(key_states, value_states, *args, **kwargs)

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._per_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._per_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._per_batch(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if self.refuse_crop is not None:
            raise ValueError(self.refuse_crop)
        super().crop(tokens_to_remove)
        if not tokens_to_remove:
            return
        left = slice(-abs(tokens_to_remove))
        self.valid = None if self.valid is None else self.valid[..., left]
        self.hidden = None if self.hidden is None else self.hidden[..., left]
        self.books = {name: book[:, :, left] for name, book in self.books.items()}

    def reset(self) -> None:
        super().reset()
        self.start_books()


def picks(x: Tensor, keep: LongTensor) -> Tensor:
    """The entries ``keep`` [B, 1 or H, K] of ``x`` [B, 1 or H, n, ...], per head where either differs by head.

    Vectors are copied as whole rows: gathering them element by element takes several times as long.
    """
    heads = max(x.shape[1], keep.shape[1])
    x, keep = x.expand(-1, heads, *x.shape[2:]), keep.expand(-1, heads, -1)
    if x.ndim == 3:
        return x.gather(2, keep)
    width = x.shape[3:].numel()
    if not x[0, 0].is_contiguous() or x.stride(0) % width or x.stride(1) % width:
        x = x.contiguous()
    # rows of the storage, which may have room between heads: flattening would copy all of it
    sample, head = x.stride(0) // width, x.stride(1) // width
    between = (len(x) - 1) * sample + (heads - 1) * head + x.shape[2]
    rows = x.as_strided((between, *x.shape[3:]), (width, *x.stride()[3:]))
    start = torch.arange(len(x), device=x.device)[:, None] * sample + torch.arange(heads, device=x.device) * head
    return rows.index_select(0, (keep + start[..., None]).flatten()).view(*keep.shape, *x.shape[3:])


class PrunableLayer(Logical, GrowingLayer):
    """A growing layer from which entries can be evicted."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.start_books()

    @property
    def stored(self) -> int:
        """Entries held, per head."""
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int, *args) -> tuple[int, int]:
        return self.stored + query_length, self.dropped

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Take in the new entries; returns what attention shall see: everything, or ``selected`` and the new ones."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.selected is None:
            return keys, values
        picked, self.selected = self.selected, None
        new = torch.arange(keys.shape[2] - key_states.shape[2], keys.shape[2], device=picked.device)
        seen = torch.cat([picked, new.expand(*picked.shape[:2], -1)], dim=2)
        return picks(keys, seen), picks(values, seen)

    def evict(self, keep: LongTensor, valid: Tensor | None) -> None:
        """Keep the entries ``keep`` [B, 1 or H_kv, K]; ``valid`` of the same shape marks the real ones (None: all)."""
        before = self.stored
        # entries of a ragged batch that are no real ones stand for anything, and in no order
        if valid is not None or keep.shape[-1] != before - 1 or not self._drop_one(keep):
            self.keys, self.values = picks(self.keys, keep), picks(self.values, keep)
        self.books = {name: picks(book, keep) for name, book in self.books.items()}
        self.hidden = None if self.hidden is None else picks(self.hidden, keep)
        if self.valid is not None:
            kept = picks(self.valid, keep)
            valid = kept if valid is None else kept & valid
        self.valid = valid
        self.dropped += before - keep.shape[-1]

    def _drop_one(self, keep: LongTensor) -> bool:
        """Take the one entry that ``keep`` leaves out from every head in place; False where that cannot be done."""
        if self.keys.device.type != "cpu":
            return False
        # what the sum of all places lacks
        gone = keep.shape[-1] * (keep.shape[-1] + 1) // 2 - keep.sum(-1)
        return self.without(gone.expand(self.keys.shape[:2]))


class PrunableSlidingLayer(Logical, DynamicSlidingWindowLayer):
    """A sliding-window layer that knows of tokens which left before the language model; nothing is evicted from it."""

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.start_books()

    @property
    def stored(self) -> int:
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int, *args) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, *args)
        return length, offset + self.dropped

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        result = super().update(key_states, value_states, *args, **kwargs)
        if self.valid is not None:
            self.valid = self.valid[..., self.valid.shape[-1] - self.stored :]
        return result


def managed(cache: Cache | None) -> bool:
    """Whether compression has taken over this cache's layers."""
    return cache is not None and bool(cache.layers) and isinstance(cache.layers[0], Logical)


def lead(cache: Cache) -> None:
    """Note that a compressed model is about to work on a managed cache, once."""
    for layer in cache.layers:
        layer.led = True


def note_lengths(cache: Cache) -> None:
    """Note in every layer of a managed cache whether they all hold the same number of entries."""
    uneven = len({layer.stored for layer in cache.layers}) > 1
    for layer in cache.layers:
        layer.uneven = uneven


def by_modality(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    """Entries of visual tokens and of text in every layer of a managed cache, see :meth:`Logical.by_modality`."""
    return [layer.by_modality() for layer in cache.layers if isinstance(layer, Logical)]
