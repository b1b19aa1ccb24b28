# SPDX-License-Identifier: Apache-2.0
"""Keyformer: key tokens by accumulated attention under Gumbel noise and a rising temperature, and a recent window.

Adnan et al., "Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative Inference",
arXiv 2403.09054.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..ops.kv import gumbel, simulated_mask
from ..ops.scores import softmax_of
from ..registry import register_method
from ..views import CacheLayer, Eviction
from .scored_cache import ScoredCache, check_part, check_visual_share


@register_method("keyformer")
@dataclass(frozen=True)
class Keyformer(ScoredCache):
    """Key tokens and a recent window, chosen anew after every token.

    An entry's score is the sum over all queries so far of ``softmax((x + ζ) / τ)``, x being the attention logits in
    fp32, ζ standard Gumbel noise and τ a temperature that rises from ``tau_start`` at the prompt to ``tau_end`` after
    ``horizon`` further tokens. The attention itself is left alone. Of ``budget`` entries the newest ``recent`` always
    stay, the others are the best scored. Keys keep their positions.

    This is the policy that the paper describes. The released code hides one more token at the edge of the window for
    good, so that its key set never changes after the prompt, frees nothing, and sums the scores over the batch
    (``official_quirks``). Ours frees the memory, decides per row and KV head, and its noise depends on ``seed``, the
    layer, the head and the two tokens alone, so that a batch and its rows alone agree.

    Args:
        budget: entries per head, a number (int) or a share of the prompt, rounded down (float).
        recent: window, of the budget: a number (int) or its share, rounded down (float).
        tau_start, tau_end: temperatures.
        horizon: tokens after which the temperature has reached ``tau_end`` (the code: the answer's longest length).
        noise: whether there is noise; without it and at temperature 1 this is H2O.
        seed: of the noise.
        visual_share: part of the key tokens that goes to visual tokens, the rest to text (ours); None: one ranking.
        official_quirks: the released behaviour, for conformance.
    """

    budget: int | float = 0.6
    recent: int | float = 0.3
    tau_start: float = 1.0
    tau_end: float = 2.0
    horizon: int = 512
    noise: bool = True
    seed: int = 0
    visual_share: float | None = None
    official_quirks: bool = False

    summary: ClassVar[str] = "KV cache: key tokens by noisy accumulated attention, and the newest ones"
    paper: ClassVar[str] = "arXiv 2403.09054"

    def validate(self) -> None:
        check_part(self.budget, "budget", least=1 if isinstance(self.budget, int) else 0)
        check_part(self.recent, "recent")
        check_visual_share(self.visual_share)
        if isinstance(self.budget, int) and isinstance(self.recent, int) and self.recent > self.budget:
            raise ValueError(f"recent={self.recent} is more than the budget, {self.budget}.")
        if not self.tau_start > 0 or not self.tau_end > 0:
            raise ValueError(f"tau_start and tau_end are above 0, not {self.tau_start} and {self.tau_end}.")
        if isinstance(self.horizon, bool) or not isinstance(self.horizon, int) or self.horizon < 1:
            raise ValueError(f"horizon is a number of tokens, at least 1, not {self.horizon!r}.")

    def split(self, prompt: int | LongTensor) -> tuple[int | LongTensor, int | LongTensor, int]:
        total = percent_of(self.budget, prompt)
        recent = percent_of(self.recent, total)
        if isinstance(total, Tensor):
            recent = torch.minimum(torch.as_tensor(recent, device=total.device), total)
        else:
            recent = min(recent, total)
        return total - recent, recent, 0

    def share(self) -> float | None:
        return self.visual_share

    def evicts(self, layer: CacheLayer) -> bool:
        return not self.official_quirks

    def temperature(self, step: Tensor) -> Tensor:
        """Temperature at ``step``, 0 for the prompt."""
        return self.tau_start + (self.tau_end - self.tau_start) * (step / self.horizon).clamp_max(1.0)

    def draw(self, layer: CacheLayer, rows: LongTensor, seen: int) -> Tensor:
        """[B, H, R, seen] noise on the logits of the new tokens ``rows`` [B, R]; by the tokens' numbers in their row."""
        born = layer.books["born"][:, :, None, :seen]  # [B, 1 or H_kv, 1, seen]
        number = layer.books["born"][:, :1, layer.books["born"].shape[2] - layer.new :]
        mine = number.gather(2, rows.clamp_min(0)[:, None]).unsqueeze(-1)  # [B, 1, R, 1]
        heads = torch.arange(layer.keys.shape[1] * layer.groups, device=rows.device).view(1, -1, 1, 1)
        if born.shape[1] > 1:
            born = born.repeat_interleave(layer.groups, dim=1)
        return gumbel(self.seed, torch.tensor(layer.index, device=rows.device), heads, mine, born)

    def accumulate(self, layer: CacheLayer, score: Tensor) -> Tensor:
        total = torch.zeros_like(score)
        step = self._count(layer)
        start = 0
        for rows, seen in layer.chunks():
            logits = layer.logits(rows, seen)
            if self.noise:
                logits = logits + self.draw(layer, rows, seen)
            tau = self.temperature(step[:, start : start + rows.shape[1]])
            total[..., :seen] += layer.by_group(softmax_of(logits / tau[:, None, :, None]).sum(2))
            start += rows.shape[1]
        if self.official_quirks:
            total = total.sum(0, keepdim=True).expand_as(total)
        return score + total

    def _count(self, layer: CacheLayer) -> Tensor:
        """[B or 1, new] step of every new token; numbers them in their row on the way (``books["born"]``)."""
        batch, _, n, _ = layer.keys.shape
        device, memory = layer.keys.device, layer.memory
        real = torch.ones(batch, layer.new, dtype=torch.bool, device=device)
        if layer.valid is not None:
            real = layer.valid[..., n - layer.new :].any(1)
        number = memory.get("seen", torch.zeros(batch, 1, dtype=torch.long, device=device)) + real.cumsum(1)
        first = "prompt_end" not in memory
        memory["seen"] = number[:, -1:]
        if first:
            memory["prompt_end"] = number[:, -1:]
        if self.noise:
            born = layer.books.get("born", torch.zeros(batch, 1, n, dtype=torch.int32, device=device))
            new = (number - 1).int()[:, None].expand(-1, born.shape[1], -1)
            layer.books["born"] = torch.cat([born[..., : n - layer.new], new], dim=2)
        return (number - memory["prompt_end"]).clamp_min(0).float()

    def cache(self, layer: CacheLayer, state: dict) -> Eviction | None:
        eviction = super().cache(layer, state)
        return self._quirks(layer) if self.official_quirks else eviction

    def _quirks(self, layer: CacheLayer) -> Eviction | None:
        """Hide what the released code hides: nothing that was hidden comes back."""
        score, memory = layer.books["score"], layer.memory
        best, recent = memory["best"], memory["recent"]
        hidden = layer.books.get("hidden")
        if hidden is None:
            hidden = torch.zeros_like(score, dtype=torch.bool)
        if not isinstance(best, Tensor) and recent and score.shape[-1] > best + recent:
            lost, gap = simulated_mask(score, layer.valid, best, recent)
            hidden = hidden | lost | gap
        layer.books["hidden"] = hidden
        layer.books["score"] = score.masked_fill(hidden, 0.0)
        return Eviction(hide=hidden)


def percent_of(part: int | float, length: int | LongTensor) -> int | LongTensor:
    """``part`` of ``length`` as the released code rounds it: whole percents, multiplied before they are divided."""
    if isinstance(part, int):
        return part
    percent = round(part * 100, 9)
    if isinstance(length, int):
        return math.floor(length * percent / 100)
    return (length.double() * percent / 100).floor().long()
