# SPDX-License-Identifier: Apache-2.0
"""What a method sees at the CACHE stage, and what it answers; the other stages are in `views.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dtypes import LongTensor
from .ops.scores import softmax_of


@dataclass
class CacheLayer:
    """Keys and values of one decoder layer after it has run on ``new`` further tokens.

    ``keys``, ``values`` [B, H_kv, n, d], the new tokens last; ``valid`` [B, 1 or H_kv, n] or None; ``prefill``: more
    than one token was just run, a prompt; ``visual`` [B, 1 or H_kv, n] bool or None: entries of visual tokens;
    ``groups``: query heads per KV head. ``reached`` [B, n] bool or None: entries whose token went through to the last
    decoder layer, known to :meth:`Method.settle` only.

    ``books`` and ``memory`` belong to the method and stay with the cache from call to call: a tensor in ``books``
    holds a value per entry, [B, 1 or H_kv, n, ...], and is cut, reordered (beams) and grown (with zeros) as the keys
    are; tensors in ``memory`` start with the batch and are reordered, other things stay as they are.
    """

    index: int
    depth: int
    keys: Tensor
    values: Tensor
    valid: Tensor | None
    new: int
    prefill: bool
    visual: Tensor | None
    groups: int
    books: dict[str, Tensor]
    memory: dict[str, Any]
    _logits: Callable[[LongTensor, int | None], Tensor]
    _unrotated: Callable[[], Tensor]
    reached: Tensor | None = None

    def logits(self, rows: LongTensor, upto: int | None = None) -> Tensor:
        """[B, H, R, n] fp32 attention logits, scaled, of the new tokens ``rows`` [B, R] (0 … new-1; -1: padding).

        Minus infinity where a row may not look. ``upto``: only the first so many entries are asked about. Ask for few
        rows at a time: all rows of a long prompt at once would be a [heads, N, N] tensor.
        """
        return self._logits(rows, upto)

    def attention(self, rows: LongTensor) -> Tensor:
        """[B, H, R, n] fp32: the softmax of :meth:`logits`; padding rows are zeros."""
        return softmax_of(self.logits(rows))

    def chunks(self, most: int = 2**24) -> Iterator[tuple[LongTensor, int]]:
        """The new tokens in runs of rows whose logits have at most ``most`` elements (but at least one row).

        Yields rows [B, R], -1 where a token is padding, and the number of entries that the last of them may see.
        """
        batch, heads, n, _ = self.keys.shape
        step = max(1, most // (batch * heads * self.groups * n))
        rows = torch.arange(self.new, device=self.keys.device).expand(batch, -1)
        if self.valid is not None:
            rows = rows.masked_fill(~self.valid[..., n - self.new :].any(1), -1)
        for start in range(0, self.new, step):
            end = min(start + step, self.new)
            yield rows[:, start:end], n - self.new + end

    def by_group(self, per_head: Tensor) -> Tensor:
        """[B, H, ...] per query head → [B, H_kv, ...]: the sum over the query heads that share a KV head."""
        return per_head if self.groups == 1 else per_head.unflatten(1, (-1, self.groups)).sum(2)

    def new_keys_unrotated(self) -> Tensor:
        """[B, H_kv, new, d] keys of the new tokens before the rotary embedding."""
        return self._unrotated()


@dataclass
class AttendLayer:
    """One decoder layer before it runs on ``new`` tokens, with the entries that its cache already holds.

    ``keys`` [B, H_kv, n, d]; ``valid`` [B, 1 or H_kv, n] or None; ``new_valid`` [B, new] or None: new tokens that are
    not padding; ``books`` and ``memory`` as in :class:`CacheLayer`.
    """

    index: int
    depth: int
    keys: Tensor
    valid: Tensor | None
    new: int
    new_valid: Tensor | None
    books: dict[str, Tensor]
    memory: dict[str, Any]
    _query: Callable[[LongTensor | None], Tensor]

    def query(self, positions: LongTensor | None = None) -> Tensor:
        """[B, H, new, d] queries of the new tokens, rotated to ``positions`` [B or 1, new] (None: their own)."""
        return self._query(positions)


@dataclass
class Eviction:
    """``keep`` [B, 1 or H_kv, K]: sorted entries that stay; ``valid`` of the same shape marks the real ones (None: all).

    ``shift`` [B]: how far later tokens move up in this layer's position ids, beyond what left before; only for methods
    whose released code does so, and only followed under contiguous positions. ``hide`` [B, 1 or H_kv, n] marks entries
    that stay in memory, but are not shown to the next tokens; it replaces what was hidden before. ``blind``: with
    it a next token that comes alone does not see itself either. ``keep`` None: all stay.
    """

    keep: LongTensor | None = None
    valid: Tensor | None = None
    shift: LongTensor | None = None
    hide: Tensor | None = None
    blind: bool = False
