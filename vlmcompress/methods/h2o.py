# SPDX-License-Identifier: Apache-2.0
"""H2O: the cache keeps the entries with the largest accumulated attention and the most recent ones.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..ops.kv import share_of, simulated_mask
from ..ops.scores import softmax_of
from ..registry import register_method
from ..views import CacheLayer, Eviction
from .scored_cache import ScoredCache, check_part, check_visual_share


def attention_sums(layer: CacheLayer, weights: Tensor | None = None) -> Tensor:
    """[B, H_kv, n] fp32: attention that each entry gets from the new tokens, summed over them and over their heads.

    ``weights`` [B or 1, new] weigh the tokens. Rows are asked for in chunks, so that no map of the prompt is formed.
    """
    batch, _, n, _ = layer.keys.shape
    total, start = None, 0
    for rows, seen in layer.chunks():
        attention = softmax_of(layer.logits(rows, seen))
        if weights is None:
            part = attention.sum(2)
        else:
            of_rows = weights[:, start : start + rows.shape[1]].expand(batch, -1)
            part = torch.einsum("bhrn,br->bhn", attention, of_rows)
        part = torch.nn.functional.pad(layer.by_group(part), (0, n - seen))
        total = part if total is None else total + part
        start += rows.shape[1]
    assert total is not None
    return total


@register_method("h2o")
@dataclass(frozen=True)
class H2O(ScoredCache):
    """Heavy hitters and a recent window, chosen anew after every token.

    An entry's score is the sum of the attention that all queries so far gave it (the prompt's and the decoded ones'),
    in fp32. The prompt attends fully; then, and after each decoded token, the ``heavy`` best of the entries outside
    the window stay, and the ``recent`` newest ones. Keys keep their positions.

    Differs from the official real-drop code, which it reproduces exactly otherwise: batches and padding work (the code
    asserts batch 1; a row's share is of its own tokens), and with grouped-query attention one decision is made per KV
    head, by the sum over its query heads (the code fails there).

    Args:
        heavy, recent: entries per head, as numbers (int) or shares of the prompt, rounded down (float).
        visual_share: part of the heavy entries that goes to visual tokens, the rest to text (ours); None: one ranking.
        masked: the official mask simulation instead of real eviction, for conformance: entries are hidden and can come
            back, nothing is freed, and the token that leaves the window is hidden for at least one step. With ``recent`` 0
            a decoded token does not see itself.
    """

    heavy: int | float = 0.1
    recent: int | float = 0.1
    visual_share: float | None = None
    masked: bool = False

    summary: ClassVar[str] = "KV cache: most attended entries so far, and the newest ones"
    paper: ClassVar[str] = "arXiv 2306.14048"

    def validate(self) -> None:
        check_part(self.heavy, "heavy")
        check_part(self.recent, "recent")
        check_visual_share(self.visual_share)
        if not self.heavy and not self.recent:
            raise ValueError("heavy and recent cannot both be 0: nothing would stay in the cache.")
        if self.masked and self.visual_share is not None:
            raise ValueError("masked is the official simulation, which has no visual_share.")

    def split(self, prompt: int | LongTensor) -> tuple[int | LongTensor, int | LongTensor, int]:
        return share_of(self.heavy, prompt), share_of(self.recent, prompt), 0

    def share(self) -> float | None:
        return self.visual_share

    def accumulate(self, layer: CacheLayer, score: Tensor) -> Tensor:
        return score + attention_sums(layer)

    def cache(self, layer: CacheLayer, state: dict) -> Eviction | None:
        eviction = super().cache(layer, state)
        return self._simulate(layer) if self.masked else eviction

    def evicts(self, layer: CacheLayer) -> bool:
        return not self.masked

    def _simulate(self, layer: CacheLayer) -> Eviction:
        """Hide what the official mask hides from the next query; scores that lost start anew, the gap's does not.

        Without a window no score is lost, and the next query does not see its own token.
        """
        score, memory = layer.books["score"], layer.memory
        best, recent = memory["best"], memory["recent"]
        lost, gap = simulated_mask(score, layer.valid, best, recent)
        if bool((torch.as_tensor(recent) == 0).any()):
            if layer.valid is not None:
                raise ValueError(
                    "masked without a recent window takes no padding: the official code knows single rows only."
                )
            return Eviction(hide=lost, blind=score.shape[-1] > best)
        layer.books["score"] = score.masked_fill(lost, 0.0)
        return Eviction(hide=lost | gap)
