# SPDX-License-Identifier: Apache-2.0
"""LazyEviction: tokens that keep coming back stay, and decisions are taken once per window of decoded tokens.

Zhang et al., "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning",
arXiv 2506.15969.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..method import Method, Stage
from ..ops.kv import recurrence, retain
from ..registry import register_method
from ..views import CacheLayer, Eviction
from .scored_cache import check_visual_share


@register_method("lazyeviction")
@dataclass(frozen=True)
class LazyEviction(Method):
    """Track when each entry was last attended to and its longest quiet spell; evict every ``window`` decoded tokens.

    An entry is active at a step when the new token gives it at least ``alpha`` attention. Every ``window`` steps, when
    more than ``budget`` entries are stored, the newest ``window`` ones stay and of the others those with the largest
    importance (:func:`vlmcompress.ops.kv.recurrence`). Prompts are not observed, also those of later turns, and count
    no steps. Until the first window is full nothing leaves: the peak is the prompt plus ``window``.

    Differs from the official code: keys are cached once per KV head, active when any query head of its group is (the
    code stores a copy per query head); steps are counted in 32 bits (the code counts in the attention's dtype, which
    rounds above 2048 in half precision); padding is left out of the softmax; state belongs to the cache.

    Args:
        budget: entries per head (the scripts: 1492 for Qwen, 1334 for Llama).
        window: decoded tokens between decisions, at most the budget; meant as the quiet spell that 80 % of the tokens
            stay below (the paper's tasks: 27 to 363).
        alpha: attention from which on an entry is active (the scripts: 1e-4 for Qwen, 5e-4 for Llama).
        formula: "code" or "paper": the importance as in the released code, which rates quiet tokens lower.
        visual_share: part of the chosen entries that goes to visual tokens, the rest to text (ours); None: one ranking.
    """

    budget: int = 1334
    window: int = 101
    alpha: float = 5e-4
    formula: str = "code"
    visual_share: float | None = None

    summary: ClassVar[str] = "KV cache: tokens whose attention recurs; decided once per window of decoded tokens"
    paper: ClassVar[str] = "arXiv 2506.15969"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.CACHE})
    published_positions: ClassVar[str] = "original"
    query_aware: ClassVar[bool] = True

    def validate(self) -> None:
        for name in ("budget", "window"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is a number of cache entries, at least 1, not {value!r}.")
        if self.window > self.budget:
            raise ValueError(
                f"window={self.window} is more than the budget, {self.budget}, which holds the window too."
            )
        if isinstance(self.alpha, bool) or not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share of attention from 0 to 1, not {self.alpha!r}.")
        if self.formula not in ("code", "paper"):
            raise ValueError(f"formula is 'code' or 'paper', not {self.formula!r}.")
        check_visual_share(self.visual_share)

    def cache(self, layer: CacheLayer, state: dict) -> Eviction | None:
        books, memory = layer.books, layer.memory
        batch, heads, n, _ = layer.keys.shape
        if "last" not in books:
            books["last"] = torch.zeros(batch, heads, n, dtype=torch.int32, device=layer.keys.device)
            books["longest"] = torch.zeros_like(books["last"])
            memory["step"] = 0
            # a first token that comes alone is a prompt of one token
            return None
        if layer.new > 1:
            books["last"][..., n - layer.new :] = memory["step"]
            return None
        memory["step"] += 1
        self._observe(layer, memory["step"])
        if n <= self.budget or memory["step"] % self.window:
            return None
        importance = recurrence(
            books["last"], books["longest"], memory["step"], official=self.formula == "code"
        )  # fmt: skip
        keep, real = retain(
            importance, layer.valid, self.budget - self.window, self.window, width=self.budget,
            visual=layer.visual, visual_share=self.visual_share,
        )  # fmt: skip
        return Eviction(keep, real)

    def _observe(self, layer: CacheLayer, step: int) -> None:
        """Note which entries the one new token attends to."""
        books = layer.books
        last, longest = books["last"], books["longest"]
        last[..., -1] = step - 1
        row = torch.zeros(len(last), 1, dtype=torch.long, device=last.device)
        active: Tensor = layer.by_group(layer.attention(row).squeeze(2) >= self.alpha) > 0
        if layer.valid is not None:
            active &= layer.valid
        books["longest"] = torch.where(active, torch.maximum(longest, step - last), longest)
        books["last"] = last.masked_fill(active, step)
