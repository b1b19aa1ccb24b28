# SPDX-License-Identifier: Apache-2.0
"""Layers of ours in the place of a cache's stock layers: which caches can be taken over, and how."""

from __future__ import annotations

from functools import cache as remembered
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedCache,
    StaticCache,
    StaticLayer,
)

from ..compat import QuantizedBase
from ..tokens import Frame
from .cache import Logical, PrunableLayer, PrunableSlidingLayer


class LogicalStaticLayer(Logical, StaticLayer):
    """A preallocated layer that knows of tokens which left before the language model; nothing leaves from it.

    What is written in the books is written behind the language model, so that a compiled step has none of it. ``stored``
    counts entries without asking the device.
    """

    stored: int = 0

    def get_seq_length(self):
        return super().get_seq_length() + self.dropped

    def get_mask_sizes(self, query_length: int, *args) -> tuple[int, int]:
        return self.max_cache_len, self.dropped

    def update(self, key_states: torch.Tensor, *args, **kwargs):
        self.check_led(key_states.shape[-2])
        return StaticLayer.update(self, key_states, *args, **kwargs)

    def commit(self, frame: Frame, columns: int, modality: bool = False) -> None:
        new = frame.index.shape[1]
        self.stored += new
        if self.valid is not None:
            self.valid = pad(self.valid, (0, new), value=True)
        super().commit(frame, columns, modality)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.stored -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.stored = 0


class _LogicalQuantized(Logical):
    """The same for layers that quantise what they hold."""

    cumulative_length: int

    @property
    def stored(self) -> int:
        return self.cumulative_length

    def get_seq_length(self) -> int:
        return self.cumulative_length + self.dropped

    def get_mask_sizes(self, query_length: int, *args) -> tuple[int, int]:
        return self.cumulative_length + query_length, self.dropped


@remembered
def _quantized(kind: type) -> type:
    return type(f"Logical{kind.__name__}", (_LogicalQuantized, kind), {})


def manage(cache: Cache, n_layers: int) -> None:
    """Put layers of ours into a cache, in place, taking over what it already holds.

    Raises ``ValueError`` for caches that compression does not know.
    """
    check_cache(cache)
    while len(cache.layers) < n_layers:
        cache.layers.append(PrunableLayer())
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, Logical):
            cache.layers[index] = _ours(layer)


def _ours(layer: Any) -> Logical:
    """A layer of ours with everything that the stock ``layer`` holds."""
    if isinstance(layer, QuantizedBase):
        return _adopted(_quantized(type(layer)), layer)
    if isinstance(layer, StaticLayer):
        new = _adopted(LogicalStaticLayer, layer)
        new.stored = int(layer.get_seq_length())
        return new
    return _adopted(PrunableSlidingLayer if type(layer) is DynamicSlidingWindowLayer else PrunableLayer, layer)


def _adopted(kind: type, layer: Any) -> Any:
    new = kind.__new__(kind)
    new.__dict__.update(layer.__dict__)
    new.start_books()
    return new


def flat_mask(mask: Any, cache: Cache | None, columns: int) -> Any:
    """The 2-D mask behind the ready-made 4-D one that ``generate`` hands on with a static cache; others as they are.

    [B, stored + columns] bool: what the last new token sees, which is everything real when padding is on the left.
    """
    if not isinstance(cache, StaticCache):
        return mask
    mask = mask.get("full_attention") if isinstance(mask, dict) else mask
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4:
        return mask
    layer = cache.layers[0]
    stored = layer.stored if isinstance(layer, LogicalStaticLayer) else int(layer.get_seq_length())
    row = mask[:, 0, -1, : stored + columns]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2


def check_cache(cache: Cache, evicting: str | None = None) -> None:
    """Raise ``ValueError`` in one sentence for a cache that compression cannot work with.

    ``evicting``: the method whose choices need a cache that can give up entries, None where all methods finish before
    the language model.
    """
    growing = DynamicLayer, DynamicSlidingWindowLayer, PrunableLayer, PrunableSlidingLayer
    dynamic = isinstance(cache, DynamicCache) or type(cache) is Cache
    if not dynamic and not isinstance(cache, (StaticCache, QuantizedCache)):
        raise ValueError(
            f"Compression does not work on {type(cache).__name__}; leave cache_implementation at its default."
        )
    for layer in cache.layers:
        if type(layer) in growing:
            continue
        if type(layer) not in (StaticLayer, LogicalStaticLayer) and not isinstance(layer, QuantizedBase):
            raise ValueError(
                f"Compression does not work on a cache with {type(layer).__name__}; leave cache_implementation at its "
                "default."
            )
        if evicting is not None:
            raise ValueError(
                f"{type(cache).__name__} cannot give up entries, which '{evicting}' needs; leave cache_implementation at "
                "its default, or use a method that finishes before the language model (vtc-cls, grid, ...)."
            )
