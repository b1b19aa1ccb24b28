# SPDX-License-Identifier: Apache-2.0
"""The score and the cut size of FlowCut (arXiv 2505.19536), in fp32."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor


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
