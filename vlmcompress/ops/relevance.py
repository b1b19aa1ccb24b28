# SPDX-License-Identifier: Apache-2.0
"""Relevance of visual tokens to an answer, and what a predictor of it is trained on (arXiv 2506.01097).

No official code was found; where the paper is silent the choices are ours and are named here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import LongTensor
from .select import top_indices


def positive_part(attention: Tensor, gradient: Tensor) -> Tensor:
    """[B, n, n] fp32: mean over heads of what is positive in attention · gradient, both [B, H, n, n]."""
    return (attention.float() * gradient.float()).clamp_min(0).mean(1)


def step_back(row: Tensor, attention: Tensor, gradient: Tensor) -> Tensor:
    """One layer of the roll-out for a single row [B, n]: ``row + row @ positive_part(attention, gradient)``.

    Called from the last layer down to the first on the unit vector of the predicting row, it gives that row of
    ``R = R + positive_part · R`` over all layers at a cost of n² instead of n³ per layer; the backward pass visits layers
    in that order, so that one layer's map lives at a time.
    """
    return row + (row[:, None] @ positive_part(attention, gradient))[:, 0]


def roll_out(attentions: Sequence[Tensor], gradients: Sequence[Tensor], row: int) -> Tensor:
    """[B, n] relevance of every token to position ``row``, from maps [B, H, n, n] of the first to the last layer."""
    found = torch.zeros_like(attentions[0][:, 0, 0], dtype=torch.float32)
    found[:, row] = 1
    for attention, gradient in zip(reversed(attentions), reversed(gradients), strict=True):
        found = step_back(found, attention, gradient)
    return found


def relevance_labels(relevance: Tensor, valid: Tensor | None = None, drop: float = 0.5) -> Tensor:
    """[B, N] fp32 what a predictor is to learn: the lowest floor(``drop`` · N) scores at zero, the rest summing to one.

    Ties: the lower index is dropped first. ``valid`` [B, N] bool marks the real tokens of each row, or None. A row of
    zeros stays one: skip that sample.
    """
    score = relevance.float()
    valid = torch.ones_like(score, dtype=torch.bool) if valid is None else valid.bool()
    order = score.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)
    rank = order.argsort(dim=1, stable=True)
    gone = (rank < (valid.sum(1, keepdim=True) * drop).floor()) | ~valid
    score = score.masked_fill(gone, 0)
    return score / score.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def kept_of_ratio(ratio: float, n: int) -> int:
    """Tokens to keep of ``n``: ``ratio`` · n rounded down, at least one where there is one."""
    return min(n, max(1, math.floor(ratio * n + 1e-9)))


def kept_tokens(scores: Tensor, ratio: float, valid: Tensor | None = None) -> list[LongTensor]:
    """Numbers, ascending, of the tokens that each row of ``scores`` [B, N] keeps; ties: lowest index."""
    real = torch.full((len(scores),), scores.shape[1]) if valid is None else valid.sum(1)
    counts = [kept_of_ratio(ratio, n) for n in real.tolist()]
    masked = scores if valid is None else scores.masked_fill(~valid.bool(), -torch.inf)
    index = top_indices(masked, counts)
    return [row[:count] for row, count in zip(index, counts, strict=True)]


def relevance_loss(label: Tensor, logits: Tensor) -> Tensor:
    """[B] KL(label || softmax(logits)); entries whose label is zero (padding among them) contribute nothing.

    ``logits`` [B, N] fp32, minus infinity where a row is padded.
    """
    predicted = logits.log_softmax(-1).masked_fill(label == 0, 0)
    return torch.special.xlogy(label, label).sum(1) - (label * predicted).sum(1)


def masked_mean(maps: Tensor, rows: Tensor) -> Tensor:
    """[B, N] mean of ``maps`` [B, R, N] over the ``rows`` [B, R] that count; zeros where none does."""
    weight = rows.to(maps)
    return (maps * weight[..., None]).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)
