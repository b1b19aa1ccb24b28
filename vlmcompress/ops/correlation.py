# SPDX-License-Identifier: Apache-2.0
"""How much of a picture repeats itself, and which of its tokens say what it holds: token-level correlation.

Everything works on ``S`` sub-images padded to ``n`` entries; ``valid`` [S, n] marks the real ones and nothing crosses
from one sub-image to another. Attention is that of the CLS query over the patches, taken after the softmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dtypes import LongTensor

SAMPLERS = ("gumbel", "topk", "replacement")
_TINY = torch.finfo(torch.float32).tiny


def sub_images(label: LongTensor) -> tuple[LongTensor, Tensor]:
    """Bring together the entries that carry the same ``label`` [L] ≥ 0; -1 belongs nowhere.

    Returns:
        places [S, n] of the entries, sub-images in ascending order of their label, entries in their own order, padded
        behind with 0; valid [S, n] bool.
    """
    order = label.argsort(stable=True)
    order = order[label[order] >= 0]
    counts = label[order].unique_consecutive(return_counts=True)[1]
    number = torch.arange(int(counts.max()) if len(counts) else 0, device=label.device)
    valid = number < counts[:, None]
    return torch.zeros_like(valid, dtype=torch.long).masked_scatter(valid, order), valid


def repetition(
    keys: Tensor, valid: Tensor, tau_sim: float, tau_num: int | float, most: int = 2**24
) -> tuple[LongTensor, Tensor]:
    """How many other patches of its sub-image each patch resembles, and whether that is too many.

    Args:
        keys: [S, n, D] of any dtype; compared in fp32, since rounding to bf16 would move cosines by 2⁻⁸.
        valid: [S, n] bool.
        tau_sim: a patch resembles another when the cosine of their keys is larger.
        tau_num: a patch is redundant when it resembles more others than this; a float is a share of the valid patches,
            rounded down.
        most: elements of the similarity matrices formed at a time (but at least one sub-image).

    Returns:
        count [S, n] int64 and redundant [S, n] bool; zero and False where nothing is valid.
    """
    size = keys.shape[1]
    itself = torch.eye(size, dtype=torch.bool, device=keys.device)
    counts = []
    step = max(1, most // max(1, size**2))
    with torch.autocast(keys.device.type, enabled=False):
        for part, real in zip(keys.split(step), valid.split(step), strict=True):
            unit = torch.nn.functional.normalize(part.float(), dim=-1)
            alike = (unit @ unit.mT > tau_sim) & real[:, None] & real[:, :, None] & ~itself
            counts.append(alike.sum(-1))
    count = torch.cat(counts) if counts else valid.long()
    limit = (valid.sum(1, keepdim=True).double() * tau_num).floor() if isinstance(tau_num, float) else tau_num
    return count, (count > limit) & valid


def outliers(attention: Tensor, valid: Tensor, factor: float = 1.5, ignore_flat: bool = False) -> Tensor:
    """[S, n] bool: entries above the third quartile by more than ``factor`` interquartile ranges.

    Args:
        attention: [S, n], quartiles in float64 with linear interpolation over the valid entries.
        valid: [S, n] bool.
        factor: multiple of the interquartile range.
        ignore_flat: no outliers where the range is below 10⁻⁶ of the third quartile.
    """
    first, third = quartiles(attention, valid)
    spread = third - first
    found = (attention.double() > third + factor * spread) & valid
    return found & ~(spread < 1e-6 * third) if ignore_flat else found


def quartiles(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """First and third quartile of the valid entries of ``values`` [S, n]: float64 [S, 1] each, linearly interpolated."""
    ascending = values.double().masked_fill(~valid, float("inf")).sort(dim=1).values
    last = (valid.sum(1, keepdim=True) - 1).clamp_min(0)
    found = []
    for share in (0.25, 0.75):
        at = last.double() * share
        low = at.floor().long()
        a, b = (ascending.gather(1, place) for place in (low, (low + 1).minimum(last)))
        found.append(a + (b - a) * (at - low))
    return found[0], found[1]


def draw(attention: Tensor, counts: LongTensor, valid: Tensor, noise: Tensor | None, sampler: str = "gumbel") -> Tensor:
    """[S, n] bool: entries drawn with probabilities in proportion to ``attention``, ``counts`` [S] of each sub-image.

    Args:
        attention: [S, n], zeros allowed; computed with in float64.
        counts: [S] int64, at most the valid entries.
        valid: [S, n] bool.
        noise: [S, n] uniform in [0, 1); None for "topk".
        sampler: "gumbel" draws without replacement: the largest ``log a - log(-log u)``, which is the law of drawing one
            by one. "topk" takes the largest attention. "replacement" draws with replacement, by the inverse of the
            cumulated attention at the first ``counts`` valid entries of ``noise``, so that fewer distinct ones come out.
            Equal scores go to the lower index.
    """
    # attention may have run down to zero in half precision
    weight = attention.double().clamp_min(_TINY).masked_fill(~valid, 0)
    if sampler == "replacement":
        assert noise is not None
        total = weight.cumsum(1)
        drawn = torch.searchsorted(total, noise.double() * total[:, -1:], right=True)
        drawn = drawn.minimum((valid.sum(1, keepdim=True) - 1).clamp_min(0))
        counted = valid & (valid.cumsum(1) <= counts[:, None])
        spare = torch.where(counted, drawn, valid.shape[1])
        hit = torch.zeros(len(valid), valid.shape[1] + 1, dtype=torch.bool, device=valid.device)
        return hit.scatter(1, spare, True)[:, :-1] & valid
    score = weight.log()
    if sampler == "gumbel":
        assert noise is not None
        score = score - (-noise.double().clamp(_TINY, 1 - 2**-53).log()).log()
    return _top(score.masked_fill(~valid, float("-inf")), counts)


def guarded(keep: Tensor, attention: Tensor, valid: Tensor, min_tokens: int = 1) -> Tensor:
    """``keep`` [S, n] bool, filled up to ``min_tokens`` per sub-image with the largest ``attention`` [S, n]."""
    first = keep.double() * 2 + attention.double()
    enough = _top(first.masked_fill(~valid, float("-inf")), valid.sum(1).clamp_max(min_tokens))
    return keep | (enough & (keep.sum(1, keepdim=True) < min_tokens))


def fill_scores(outlier: Tensor, deep: Tensor, low: Tensor, valid: Tensor) -> Tensor:
    """[S, n] float64 ranking for a fixed number of tokens, ``-inf`` where not valid.

    Outliers come first, by their attention ``deep``, then the others by ``low``.
    """
    # attention is at most one, so that one more lifts an outlier above every other token
    score = torch.where(outlier, deep.double() + 1.0, low.double())
    return score.masked_fill(~valid, float("-inf"))


def merge_dropped(
    tokens: Tensor, keys: Tensor, weight: Tensor, keep: Tensor, valid: Tensor
) -> tuple[Tensor, LongTensor]:
    """Let every dropped token join its most similar kept one of the same sub-image.

    Args:
        tokens: [S, n, C].
        keys: [S, n, D]: similarity is their cosine in fp32, ties go to the lower index.
        weight: [S, n] weight of each token in its group's mean.
        keep, valid: [S, n] bool.

    Returns:
        [S, n, C] in the dtype of ``tokens``: the weighted mean of its group in the place of every kept token, unchanged
        where nothing joined it; [S, n] the entry that each entry now is part of (itself, where it is kept or not valid,
        or where nothing is kept).
    """
    size = keep.shape[1]
    here = torch.arange(size, device=keep.device).expand_as(keep)
    owners, rows = [], []
    joins = valid & ~keep & keep.any(1, keepdim=True)
    with torch.autocast(tokens.device.type, enabled=False):
        for x, key, w, kept, moving, own in zip(tokens, keys, weight, keep, joins, here, strict=True):
            unit = torch.nn.functional.normalize(key.float(), dim=-1)
            alike = (unit @ unit.T).masked_fill(~kept, float("-inf"))
            owner = torch.where(moving, alike.argmax(1), own)
            # attention that ran down to zero leaves a plain mean
            w = w.float().clamp_min(_TINY)[:, None]
            total = torch.zeros_like(w).index_add_(0, owner, w)
            share = w / total[owner]
            mean = torch.zeros_like(x, dtype=torch.float32).index_add_(0, owner, x.float() * share)
            alone = torch.bincount(owner, minlength=size)[:, None] <= 1
            owners.append(owner)
            rows.append(torch.where(alone, x, mean.to(x.dtype)))
    return (torch.stack(rows), torch.stack(owners)) if rows else (tokens, here)


def _top(scores: Tensor, counts: LongTensor) -> Tensor:
    """[S, n] bool: the ``counts`` [S] largest of each row, ties to the lower index."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    return rank < counts[:, None]
