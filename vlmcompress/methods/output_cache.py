# SPDX-License-Identifier: Apache-2.0
"""Output-aware cache: after the prompt, the cache of early layers forgets the visual tokens that a later cut took out.

The third stage of Liu, Shi et al., "Multi-Stage Vision Token Dropping" (MustDrop), arXiv 2411.10803, on its own, for use
behind any method that cuts inside the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..method import Method, Stage
from ..registry import register_method
from ..tokens import pack
from ..views import CacheLayer, Eviction


def output_aware(layer: CacheLayer, *, official_decode: bool = False) -> Eviction | None:
    """Evict what did not reach the last decoder layer; ``official_decode``: later tokens move up by as much."""
    assert layer.reached is not None
    leaving = ~layer.reached if layer.valid is None else ~layer.reached & layer.valid.any(1)
    if not bool(leaving.any()):
        return None
    keep, valid = pack(layer.reached, int(layer.reached.sum(1).max()))
    shift = None
    if official_decode and layer.visual is not None:
        shift = (layer.visual[:, 0] & ~layer.reached).sum(1)
    return Eviction(keep[:, None], valid[:, None], shift)


@register_method("output-cache")
@dataclass(frozen=True)
class OutputCache(Method):
    """From decoder layer ``first`` on, keep only the cache entries of tokens that went through to the last layer.

    Nothing is evicted while decoding, generated tokens always stay, and without a method that cuts inside the language
    model nothing leaves at all.

    Args:
        first: first decoder layer (0-based) that forgets; MustDrop's code spares layers 0 and 1.
    """

    first: int = 2

    summary: ClassVar[str] = (
        "early layers forget the visual tokens that later cuts took out (for use with such a method)"
    )
    paper: ClassVar[str] = "arXiv 2411.10803"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.CACHE})

    def validate(self) -> None:
        if isinstance(self.first, bool) or not isinstance(self.first, int) or self.first < 0:
            raise ValueError(f"first is the number of a decoder layer, at least 0, not {self.first!r}.")

    def settle(self, layer: CacheLayer, state: dict) -> Eviction | None:
        return output_aware(layer) if layer.index >= self.first else None
