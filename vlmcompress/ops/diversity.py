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
        [B, steps] indices in selection order. Each step is one matrix-vector product per row; nothing is N × N, and
        nothing waits for the host.
    """
    if rule not in ("maxsum", "kcenter"):
        raise ValueError(f"rule is 'maxsum' or 'kcenter', not {rule!r}.")
    unit = unit_vectors(x, torch.float32 if rule == "maxsum" else torch.float64)
    batch = torch.arange(len(x), device=x.device)
    start = 0.0 if rule == "maxsum" else -torch.inf
    score = unit.new_full(x.shape[:2], start)
    if candidates is not None:
        score = score.masked_fill(~candidates, torch.inf)
    order = pivot.new_empty(len(x), steps)
    chosen = pivot
    for step in range(steps):
        if step:
            chosen = score.argmin(1)
        order[:, step] = chosen
        if step == steps - 1:
            break
        cosine = torch.bmm(unit, unit[batch, chosen].unsqueeze(2)).squeeze(2)
        score = score + cosine if rule == "maxsum" else torch.maximum(score, cosine)
        score[batch, chosen] = torch.inf
    return order


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
