# SPDX-License-Identifier: Apache-2.0
"""A2SF: accumulated attention with a forgetting factor, so that old entries do not win by age alone.

Jo and Shin, "A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning in Transformer Decoder",
arXiv 2407.20485.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..dtypes import LongTensor
from ..ops.kv import decayed, share_of
from ..registry import register_method
from ..views import CacheLayer
from .h2o import attention_sums
from .scored_cache import ScoredCache, check_part, check_visual_share


@register_method("a2sf")
@dataclass(frozen=True)
class A2SF(ScoredCache):
    """The entries with the largest attention sums, in which every query weighs ``alpha`` times its successor.

    After query n the score of entry j is ``Σ_{q ≤ n} alpha^(n - q) p[q, j]`` (equation 5), in fp32: ``alpha`` 1 is H2O,
    0 looks at the last query only. There is no recent window in the paper; the scripts of the authors' repository use
    one. The prompt attends fully, then one entry leaves with every decoded token.

    Differs from the official code: the 2025 code simulates this by masks over a whole known sequence, whose kept sets
    come out equal; here entries leave, in batches and under padding. ``decode=False, recent=16, sinks=0`` and a number
    as ``budget`` are what the repository of 2026 does (evict once after the prompt). With grouped-query attention the
    query heads of a KV head vote together, as in that version.

    Args:
        alpha: forgetting factor in [0, 1]. The paper finds 0.1 to 0.3 best at a budget of 0.3.
        budget: entries per head in all, a number (int) or a share of the prompt, rounded to the nearest (float).
        recent: newest entries that always stay, of the budget.
        sinks: first entries that always stay, of the budget.
        decode: whether entries leave while decoding, too.
        visual_share: part of the freely chosen entries that goes to visual tokens, the rest to text (ours); None: one
            ranking.
    """

    alpha: float = 0.2
    budget: int | float = 0.3
    recent: int = 0
    sinks: int = 0
    decode: bool = True
    visual_share: float | None = None

    summary: ClassVar[str] = "KV cache: most attended entries, older attention counting less"
    paper: ClassVar[str] = "arXiv 2407.20485"

    def validate(self) -> None:
        if isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a forgetting factor from 0 to 1, not {self.alpha!r}.")
        check_part(self.budget, "budget", least=1 if isinstance(self.budget, int) else 0)
        for name in ("recent", "sinks"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is a number of cache entries, at least 0, not {value!r}.")
        if isinstance(self.budget, int) and self.recent + self.sinks > self.budget:
            raise ValueError(f"recent + sinks = {self.recent + self.sinks} is more than the budget, {self.budget}.")
        check_visual_share(self.visual_share)

    def split(self, prompt: int | LongTensor) -> tuple[int | LongTensor, int | LongTensor, int]:
        total = share_of(self.budget, prompt, add=0.5)
        best = total - self.recent - self.sinks
        return best.clamp_min(0) if isinstance(best, Tensor) else max(best, 0), self.recent, self.sinks

    def share(self) -> float | None:
        return self.visual_share

    def evicts(self, layer: CacheLayer) -> bool:
        return self.decode or layer.prefill

    def accumulate(self, layer: CacheLayer, score: Tensor) -> Tensor:
        if layer.valid is None:
            weights = decayed(layer.new, self.alpha, score.device)[None]
            faded: float | Tensor = self.alpha**layer.new
        else:
            # padding behind a row must not fade it
            real = layer.valid[..., layer.valid.shape[-1] - layer.new :].any(1)
            later = real.flip(1).cumsum(1).flip(1) - real.long()
            weights = decayed(layer.new + 1, self.alpha, score.device).flip(0)[later]
            faded = decayed(layer.new + 1, self.alpha, score.device).flip(0)[real.sum(1)].view(-1, 1, 1)
        return score * faded + attention_sums(layer, weights)
