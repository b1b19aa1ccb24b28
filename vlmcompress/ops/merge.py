# SPDX-License-Identifier: Apache-2.0
"""Merging of similar tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import LongTensor


def bipartite_merge(metric: Tensor, x: Tensor, size: Tensor, r: int) -> tuple[LongTensor, LongTensor, Tensor, Tensor]:
    """Merge the ``r`` most similar pairs between even and odd tokens (bipartite soft matching).

    Args:
        metric: [B, n, d] what similarity (cosine) is measured on.
        x: [B, n, C] tokens.
        size: [B, n] how many original tokens each stands for.
        r: pairs to merge, at most n // 2.

    Returns:
        keep [B, n - r] surviving tokens, ascending; owner [B, n] place in ``keep`` that holds each token now; the
        merged tokens [B, n - r, C] in the dtype of ``x`` (averages weighted by size, in fp32); their sizes [B, n - r].
    """
    batch, n = size.shape
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    similarity = unit[:, ::2] @ unit[:, 1::2].mT
    best, partner = similarity.max(-1)
    merging = best.argsort(dim=1, descending=True, stable=True)[:, :r]  # places among the even tokens
    source, target = merging * 2, partner.gather(1, merging) * 2 + 1

    gone = torch.zeros(batch, n, dtype=torch.bool, device=x.device).scatter(1, source, True)
    keep = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, : n - r]
    place = torch.full((batch, n), -1, dtype=torch.long, device=x.device)
    place.scatter_(1, keep, torch.arange(n - r, device=x.device).expand(batch, -1))
    owner = place.scatter(1, source, place.gather(1, target))

    weighted = x.float() * size[..., None]
    total = torch.zeros(batch, n - r, device=x.device).scatter_add(1, owner, size)
    rows = torch.zeros(batch, n - r, x.shape[-1], device=x.device)
    rows = rows.scatter_add(1, owner[..., None].expand_as(weighted), weighted) / total[..., None]
    return keep, owner, rows.to(x.dtype), total
