# SPDX-License-Identifier: Apache-2.0
"""What H2O, A2SF and Keyformer share: a score per cache entry and KV head that grows with every query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..method import Method, Stage
from ..ops.kv import retain
from ..views import CacheLayer, Eviction


def check_part(part, name: str, *, least: int = 0) -> None:
    """Raise ``ValueError`` unless ``part`` is a number of entries (int) or a share of the prompt (float in [0, 1])."""
    good = not isinstance(part, bool) and isinstance(part, (int, float)) and part >= least
    if not good or (isinstance(part, float) and part > 1):
        raise ValueError(
            f"{name} is a number of cache entries (int, at least {least}) or a share of the prompt (float up to 1), "
            f"not {part!r}."
        )


def check_visual_share(share) -> None:
    """Raise ``ValueError`` unless ``share`` is None or lies in [0, 1]."""
    if share is not None and (isinstance(share, bool) or not 0 <= share <= 1):
        raise ValueError(f"visual_share lies between 0 and 1 (None: one ranking for all entries), not {share!r}.")


@dataclass(frozen=True)
class ScoredCache(Method):
    """Base of policies that keep the best scored entries and the newest ones.

    Subclasses say how a score grows (:meth:`accumulate`) and how many entries stay (:meth:`split`). One decision per
    KV head: the query heads of its group vote together. Shares are of the prompt's real tokens, fixed when the prompt
    has run; a later prompt on the same cache (a second turn) adds its own.
    """

    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.CACHE})
    published_positions: ClassVar[str] = "original"
    query_aware: ClassVar[bool] = True

    def accumulate(self, layer: CacheLayer, score: Tensor) -> Tensor:
        """The scores [B, H_kv, n] after the new tokens of ``layer``; ``score``: those before, 0 for new entries."""
        raise NotImplementedError

    def split(self, prompt: int | LongTensor) -> tuple[int | LongTensor, int | LongTensor, int]:
        """(best, recent, sinks) entries for a prompt of so many tokens (an int, or [B])."""
        raise NotImplementedError

    def share(self) -> float | None:
        """Part of the best that goes to visual entries; None: one ranking for all."""
        return None

    def evicts(self, layer: CacheLayer) -> bool:
        """Whether entries leave after this call."""
        return True

    def cache(self, layer: CacheLayer, state: dict) -> Eviction | None:
        batch, heads, n, _ = layer.keys.shape
        score = layer.books.get("score")
        if score is None:
            score = torch.zeros(batch, heads, n, device=layer.keys.device)
        layer.books["score"] = score = self.accumulate(layer, score)
        self._note_prompt(layer)
        memory = layer.memory
        if n <= memory["least"] or not self.evicts(layer):
            return None
        keep, real = retain(
            score, layer.valid, memory["best"], memory["recent"], memory["sinks"], width=memory["width"],
            visual=layer.visual, visual_share=self.share(),
        )  # fmt: skip
        return Eviction(keep, real)

    def _note_prompt(self, layer: CacheLayer) -> None:
        """Set the budgets by the prompt; the host learns their extremes once per prompt and layer."""
        memory, n = layer.memory, layer.keys.shape[2]
        if "best" in memory and layer.new == 1:
            return
        # what a cache held before this method came to it belongs to the prompt
        new: int | LongTensor = layer.new if "prompt" in memory else n
        if layer.valid is not None:
            new = layer.valid[..., n - new :].sum(-1).amax(1)
        memory["prompt"] = prompt = memory.get("prompt", 0) + new
        best, recent, sinks = self.split(prompt)
        # shares of a prompt of a few tokens can all round to nothing, and something has to stay
        if isinstance(best, Tensor) or isinstance(recent, Tensor):
            recent = torch.where(torch.as_tensor(best + recent + sinks) == 0, 1, recent)
            totals = best + recent + sinks
            memory["least"], memory["width"] = (int(x) for x in torch.stack(totals.aminmax()).tolist())
        else:
            recent = recent if best + recent + sinks else 1
            memory["least"] = memory["width"] = best + recent + sinks
        memory["best"], memory["recent"], memory["sinks"] = best, recent, sinks
