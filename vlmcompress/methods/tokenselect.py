# SPDX-License-Identifier: Apache-2.0
"""TokenSelect: nothing leaves the cache, but each step attends only to the entries that all heads vote for.

Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV
Cache Selection", arXiv 2411.02886.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..method import Method, Stage
from ..ops.kv import coarse, retain, soft_votes
from ..registry import register_method
from ..views import AttendLayer, CacheLayer, Eviction


@register_method("tokenselect")
@dataclass(frozen=True)
class TokenSelect(Method):
    """Per step and layer: the first ``sinks`` entries, the last ``local`` ones, and the ``select`` with the most votes.

    Every query head spreads one vote over the entries between (softmax of unscaled logits of the query at position
    ``local`` against keys without rotary embedding); votes are added up. All heads attend to the same choice. If a
    query's cosine to the last one that voted is at least ``reuse``, that one's choice is taken over. Prompts attend in
    full when the cache is empty; later chunks vote with their mean query when they fit into ``local``. This saves
    attention's time on long caches, not memory: the cache keeps a second copy of its keys without rotary embedding.

    Differs from the official code: query head h reads KV head ``h // (H / H_kv)`` (the kernel takes h mod H_kv, see
    ``official_heads``); votes are in fp32, not in half precision, and tie when they agree to 14 binary places (tokens that
    repeat; the earlier one is taken, whatever the batch); batches and padding work; the released code never
    runs its reuse of choices, which here follows the paper's algorithm 1. The chosen keys keep their true positions,
    where the authors renumber them 0, 1, ... to reach beyond the trained length: this does not extrapolate.

    Args:
        select: entries chosen by votes.
        sinks: first entries that are always seen.
        local: last entries that are always seen, the new token included.
        reuse: cosine from which on a choice is reused; None: every step votes.
        vote: "unrotated" as published, or "rotated": with the true positions, and without the second copy of the keys.
        official_heads: the kernel's assignment of heads, for conformance.
    """

    select: int = 2048
    sinks: int = 128
    local: int = 512
    reuse: float | None = 0.9
    vote: str = "unrotated"
    official_heads: bool = False

    summary: ClassVar[str] = "KV cache: each step attends to the entries that all heads vote for; nothing is freed"
    paper: ClassVar[str] = "arXiv 2411.02886"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.CACHE})
    published_positions: ClassVar[str] = "original"
    query_aware: ClassVar[bool] = True

    def validate(self) -> None:
        for name, least in (("select", 1), ("sinks", 0), ("local", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is a number of cache entries, at least {least}, not {value!r}.")
        if self.reuse is not None and (isinstance(self.reuse, bool) or not -1 <= self.reuse <= 1):
            raise ValueError(f"reuse is a cosine from -1 to 1, or None, not {self.reuse!r}.")
        if self.vote not in ("unrotated", "rotated"):
            raise ValueError(f"vote is 'unrotated' or 'rotated', not {self.vote!r}.")

    def cache(self, layer: CacheLayer, state: dict) -> Eviction | None:
        if self.vote == "unrotated":
            plain = layer.new_keys_unrotated().detach()
            if "plain" in layer.books:
                layer.books["plain"][:, :, -layer.new :] = plain
            else:
                layer.books["plain"] = plain
        return None

    def attend(self, layer: AttendLayer, state: dict) -> LongTensor | None:
        n, new = layer.keys.shape[2], layer.new
        if self.vote == "unrotated" and "plain" not in layer.books:
            raise ValueError(
                "'tokenselect' votes by keys without rotary embedding, which this cache does not hold for its older entries; "
                "compress the model before the cache is filled, or take vote='rotated'."
            )
        budget = self.sinks + self.select + self.local
        if budget >= n + new or new > self.local:
            return None
        query = self._mean_query(layer)
        valid = None if layer.valid is None else layer.valid[:, :1]
        places = _places(n, valid, layer.keys.device)
        # [B, 1] where the local window begins
        window = places[:, -1:] + 1 - self.local + (new if layer.new_valid is None else layer.new_valid.sum(1)[:, None])
        middle = ((places >= self.sinks) & (places < window)).expand(len(layer.keys), -1)
        if valid is not None:
            middle &= valid[:, 0]
        chosen = self._choose(layer, query, middle)
        seen = chosen | (places < self.sinks) | (places >= window)
        if valid is not None:
            seen &= valid[:, 0]
        width = min(n, budget - new)
        keep, _ = retain(seen[:, None].float(), valid, width, 0, width=width)
        return keep

    def _mean_query(self, layer: AttendLayer) -> Tensor:
        """[B, H, d] mean over the new tokens of their queries."""
        positions = None
        if self.vote == "unrotated":
            positions = self.local + torch.arange(layer.new, device=layer.keys.device)[None]
        query = layer.query(positions).float()
        if layer.new_valid is None:
            return query.mean(2)
        real = layer.new_valid[:, None, :, None]
        return (query * real).sum(2) / real.sum(2).clamp_min(1)

    def _choose(self, layer: AttendLayer, query: Tensor, middle: Tensor) -> Tensor:
        """[B, n] bool: the elected entries, or those of the last election where the query has hardly changed."""
        memory, books = layer.memory, layer.books
        hit = None
        if self.reuse is not None and "query" in memory:
            cosine = torch.nn.functional.cosine_similarity(query.flatten(1), memory["query"].flatten(1), dim=-1)
            hit = (cosine >= self.reuse) & memory["voted"]
            if bool(hit.all()):
                return books["chosen"][:, 0]
        keys = books["plain"] if self.vote == "unrotated" else layer.keys
        votes = coarse(soft_votes(query, keys, middle, modulo=self.official_heads))
        order, _ = retain(votes.masked_fill(~middle, -1.0)[:, None], None, self.select, 0, width=self.select)
        chosen = torch.zeros_like(middle).scatter(1, order[:, 0], True) & middle
        if hit is not None:
            chosen = torch.where(hit[:, None], books["chosen"][:, 0], chosen)
            query = torch.where(hit.view(-1, 1, 1), memory["query"], query)
        if self.reuse is not None:
            memory["query"], books["chosen"] = query, chosen[:, None]
            # a row that still sees everything has not voted yet
            memory["voted"] = middle.sum(1) > self.select
        return chosen


def _places(n: int, valid: Tensor | None, device: torch.device) -> LongTensor:
    """[B or 1, n] number of every entry among its row's real ones."""
    if valid is None:
        return torch.arange(n, device=device)[None]
    return valid[:, 0].long().cumsum(1) - 1
