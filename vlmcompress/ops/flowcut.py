# SPDX-License-Identifier: Apache-2.0
"""The score and the cut size of FlowCut (arXiv 2505.19536), in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import LongTensor
from .select import top_indices


def value_magnitude(values: Tensor) -> Tensor:
    """L1 norm of the head-averaged value vectors: [B, H, n, d] → [B, n] fp32."""
    return values.float().mean(1).abs().sum(-1)


def flow_score(attention: Tensor, similarity: Tensor | None, magnitude: Tensor) -> Tensor:
    """How much information flows through each token.

    ``attention``, ``similarity`` and ``magnitude`` [B, n]: attention from the global token, similarity of the values to
    its value (None where the released code has no such term; attention then stays as it is) and
    :func:`value_magnitude`. The first two are scaled to sum one; padding must hold zeros. Returns [B, n] fp32.
    """
    attention = attention.float()
    if similarity is None:
        return attention * magnitude
    return (shares(attention) + shares(similarity.float())) * magnitude


def shares(weights: Tensor) -> Tensor:
    """Scale the rows of ``weights`` [B, n] to sum one (a row of zeros stays)."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def entropy_ratio(weights: Tensor, counts: LongTensor, floor: float = 0.0) -> Tensor:
    """Entropy of each row of ``weights`` [B, n] over the largest one that ``counts[b]`` tokens can have: [B] in [0, 1].

    ``floor`` is added inside the logarithm. Padding holds zeros; 0 · log 0 counts as 0, where the released code for
    towers with a CLS token yields NaN and raises.
    """
    entropy = -torch.special.xlogy(weights, weights + floor).sum(-1)
    return entropy / counts.clamp_min(2).log()


def cut_sizes(ratio: Tensor, counts: LongTensor, targets: LongTensor, left: int) -> Tensor:
    """Real-valued number of tokens to drop, [B]: (n - T) / √left · (1 - ratio²).

    ``left``: layers that still follow before the last cut, at least 1. Not rounded, so that rows may share their
    largest before they are.
    """
    return (counts - targets).float() / left**0.5 * (1 - ratio**2)


def mean_token(x: Tensor, valid: Tensor | None) -> Tensor:
    """[V, H, n, d] → [V, H, d] fp32: the mean over the real tokens."""
    if valid is None:
        return x.float().mean(2)
    weight = valid.float() / valid.sum(1, keepdim=True)
    return torch.einsum("vhnd,vn->vhd", x.float(), weight)


def top_blocks(scores: Tensor, counts: list[int], block: int) -> LongTensor:
    """:func:`top_indices` of whole runs of ``block`` neighbours, by the sum of their scores [V, n]."""
    if block == 1:
        return top_indices(scores, counts)
    best = top_indices(scores.unflatten(1, (-1, block)).sum(-1), [n // block for n in counts])
    return (best[..., None] * block + torch.arange(block, device=best.device)).flatten(1)
