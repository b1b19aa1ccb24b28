# SPDX-License-Identifier: Apache-2.0
"""A sliding window over the cache with the first entries kept: the plainest CACHE policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import Method, Stage
from ..registry import register_method
from ..views import CacheLayer, Eviction


@register_method("keep-last")
@dataclass(frozen=True)
class KeepLast(Method):
    """Keep the first ``sinks`` and the last entries of every layer's cache, ``budget`` in all.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, but with original
    positions.

    Args:
        budget: entries per head of every decoder layer.
        sinks: entries at the start that always stay.
    """

    budget: int = 256
    sinks: int = 4

    summary: ClassVar[str] = "the last entries of the KV cache, and the first few"
    paper: ClassVar[str] = "arXiv 2309.17453"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.CACHE})
    published_positions: ClassVar[str] = "original"

    def validate(self) -> None:
        if isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1:
            raise ValueError(f"budget is a number of cache entries, at least 1, not {self.budget!r}.")
        if not 0 <= self.sinks < self.budget:
            raise ValueError(f"sinks lies between 0 and budget - 1 = {self.budget - 1}, not {self.sinks}.")

    def cache(self, layer: CacheLayer, state: dict) -> Eviction | None:
        batch, _, n, _ = layer.keys.shape
        if n <= self.budget:
            return None
        recent = torch.arange(n - self.budget + self.sinks, n, device=layer.keys.device).expand(batch, -1)
        if layer.valid is None:
            first = torch.arange(self.sinks, device=recent.device).expand(batch, -1)
        else:
            # padding stands in front, so the first real entries differ from row to row
            start = layer.valid[:, 0].to(torch.uint8).argmax(1, keepdim=True)
            first = (start + torch.arange(self.sinks, device=recent.device)).clamp_max(n - self.budget + self.sinks - 1)
        keep = torch.cat([first, recent], dim=1)[:, None]
        if layer.valid is None:
            return Eviction(keep)
        real = torch.ones_like(keep, dtype=torch.bool)
        # a row with little behind its padding may have met the window already: count an entry once
        real[:, 0, 1 : self.sinks] = first.diff(dim=1) > 0
        return Eviction(keep, real)
