# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of tokens that are spread out in cosine terms (ToDRE, stage 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import LongTensor


def unit_vectors(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x`` [..., C] divided by its length in ``dtype``; a zero vector stays zero."""
    x = x.to(dtype)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


def diverse_order(
    x: Tensor, pivot: LongTensor, steps: int, *, rule: str = "maxsum", candidates: Tensor | None = None
) -> LongTensor:
    """Tokens in the order in which a greedy rule adds them to the pivot, for a whole batch at once.

    Args:
        x: [B, N, C] features; cosines are taken in fp32 ("maxsum") or fp64 ("kcenter", whose near-ties need it).
        pivot: [B] first token of each row.
        steps: tokens to choose, the pivot included; no more than the smallest number of candidates of interest: a row
            that runs out repeats the index 0 of what is left.
        rule: "maxsum" adds the token with the least sum of cosines to all chosen ones, "kcenter" the one whose largest
            cosine to a chosen one is least. Ties go to the lowest index.
        candidates: [B, N] bool, or None for all.

    Returns:
        [B, steps] indices in selection order. Nothing is N × N. On a GPU each step is one matrix-vector product per row and
        nothing waits for the host; on a CPU the cosines of the likeliest next tokens are taken ahead, in one matrix
        product (:class:`_Ahead`), which spares most of the reading of ``x``.
    """
    if rule not in ("maxsum", "kcenter"):
        raise ValueError(f"rule is 'maxsum' or 'kcenter', not {rule!r}.")
    unit = unit_vectors(x, torch.float32 if rule == "maxsum" else torch.float64)
    batch = torch.arange(len(x), device=x.device)
    score = unit.new_full(x.shape[:2], 0.0 if rule == "maxsum" else -torch.inf)
    if candidates is not None:
        score.masked_fill_(~candidates, torch.inf)
    cosines = _Ahead(unit) if x.device.type == "cpu" else _Single(unit)
    order = pivot.new_empty(len(x), steps)
    chosen = pivot
    for step in range(steps):
        if step:
            chosen = score.argmin(1)
        order[:, step] = chosen
        if step == steps - 1:
            break
        cosine = cosines.of(chosen, score)
        if rule == "maxsum":
            score += cosine
        else:
            torch.maximum(score, cosine, out=score)
        score[batch, chosen] = torch.inf
    return order


class _Single:
    """Cosines of the chosen tokens to all tokens of ``unit`` [B, N, C], asked one step at a time."""

    def __init__(self, unit: Tensor):
        self.unit, self.batch = unit, torch.arange(len(unit), device=unit.device)

    def of(self, chosen: LongTensor, score: Tensor) -> Tensor:
        """[B, N] for the tokens ``chosen`` [B]."""
        return torch.bmm(self.unit, self.unit[self.batch, chosen].unsqueeze(2)).squeeze(2)


class _Ahead(_Single):
    """The same, in blocks: a token without its cosines brings those of the tokens that are next in line now.

    A greedy choice moves slowly through the ranking, so that most tokens never need theirs, and the product of a block
    reads ``unit`` once, as that of a single token does.
    """

    def __init__(self, unit: Tensor, block: int = 32):
        super().__init__(unit)
        self.block = min(block, unit.shape[1])
        self.slot = torch.full(unit.shape[:2], -1)
        self.rows: list[Tensor] = []

    def of(self, chosen: LongTensor, score: Tensor) -> Tensor:
        at = self.slot[self.batch, chosen]
        if bool((at < 0).any()):
            self._fetch(chosen, score)
            at = self.slot[self.batch, chosen]
        places = [divmod(place, self.block) for place in at.tolist()]
        return torch.stack([self.rows[block][row, place] for row, (block, place) in enumerate(places)])

    def _fetch(self, chosen: LongTensor, score: Tensor) -> None:
        """Take the cosines of the next block of every row: ``chosen`` and the best scored without any."""
        line = score.clamp_min(torch.finfo(score.dtype).min).masked_fill(self.slot >= 0, torch.inf)
        line[self.batch, chosen] = -torch.inf
        # a token that has its cosines already may come again, in front of the block or at the end of the tokens
        index = line.topk(self.block, dim=1, largest=False).indices
        picked = self.unit.gather(1, index[..., None].expand(-1, -1, self.unit.shape[2]))
        self.slot.scatter_(1, index, torch.arange(self.block).expand_as(index) + len(self.rows) * self.block)
        self.rows.append(torch.bmm(picked, self.unit.mT))


def direction_pivot(x: Tensor, *, farthest: bool, candidates: Tensor | None = None) -> LongTensor:
    """[B] the token of ``x`` [B, N, C] whose cosine to the mean direction is least (``farthest``) or largest."""
    unit = unit_vectors(x)
    if candidates is not None:
        unit = unit.masked_fill(~candidates[..., None], 0)
    similarity = torch.einsum("bnc,bc->bn", unit, unit.sum(1))
    if not farthest:
        similarity = -similarity
    if candidates is not None:
        similarity = similarity.masked_fill(~candidates, torch.inf)
    return similarity.argmin(1)
