# SPDX-License-Identifier: Apache-2.0
"""Choosing indices: deterministic top-k with ragged budgets, even grids, apportionment."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import LongTensor
from .places import leading, on_device


def top_indices(scores: Tensor, counts: list[int]) -> LongTensor:
    """Indices of the ``counts[i]`` largest scores of each row, ascending; ties go to the lowest index.

    Args:
        scores: [I, n]; put ``-inf`` where nothing may be chosen.
        counts: how many to take from each row.

    Returns:
        [I, max(counts)]; row i holds ``counts[i]`` indices and is padded behind with the row's next best ones.
    """
    width = max(counts, default=0)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :width]
    if all(c == width for c in counts):
        return order.sort(dim=1).values
    surplus = ~leading(counts, width, scores.device)
    # sort the chosen ones among themselves and leave the padding behind them
    key = order + surplus * scores.shape[1]
    return order.gather(1, key.argsort(dim=1, stable=True))


def top_mask(scores: Tensor, counts: list[int]) -> Tensor:
    """[I, n] bool mask of the ``counts[i]`` largest scores of each row; ties go to the lowest index."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    return rank < on_device(counts, scores.device)[:, None]


def even_indices(n: int, k: int) -> LongTensor:
    """``k`` indices spread evenly over ``range(n)``: the centres of k equal bins, ascending and unique for k ≤ n."""
    return ((torch.arange(k) * 2 + 1) * n).div(2 * k, rounding_mode="floor")


def fit_grid(k: int, rows: int, cols: int) -> tuple[int, int]:
    """Rectangle (h, w) with h ≤ rows, w ≤ cols and at most ``k`` cells, nearest to k, then to the aspect of the grid.

    Rectangles more than twice as elongated as the grid are only taken when nothing else fits.
    """
    aspect = cols / rows
    best, best_key = (1, 1), (-1.0, 0.0)
    for h in range(1, min(rows, k) + 1):
        w = min(cols, k // h)
        skew = abs(math.log(w / h / aspect))
        fill = h * w / k
        key = (fill if skew <= 0.7 else fill - 1.0, -skew)
        if key > best_key:
            best, best_key = (h, w), key
    return best


def largest_remainder(shares: list[float], total: int, caps: list[int]) -> list[int]:
    """Split ``total`` in proportion to ``shares`` into whole numbers that add up to it exactly.

    ``caps[j]`` bounds part j; what a full part cannot take goes to the others. Raises ``ValueError`` when the caps
    cannot hold ``total``.
    """
    if total > sum(caps):
        raise ValueError(f"{total} tokens do not fit into parts that hold {sum(caps)}.")
    weight, left = list(shares), total
    open_parts = set(range(len(shares)))
    result = [0] * len(shares)
    while True:
        whole = sum(weight[j] for j in open_parts)
        if whole <= 0:  # parts without a share take evenly what the others cannot
            weight, whole = [1.0] * len(shares), float(len(open_parts))
        ideal = {j: left * weight[j] / whole for j in open_parts}
        full = {j for j in open_parts if ideal[j] >= caps[j]}
        if not full:
            break
        for j in full:
            result[j] = caps[j]
        left -= sum(caps[j] for j in full)
        open_parts -= full
        if not open_parts:
            return result
    for j in open_parts:
        result[j] = int(ideal[j])
    rest = total - sum(result)
    for j in sorted(open_parts, key=lambda j: (-(ideal[j] - int(ideal[j])), j))[:rest]:
        result[j] += 1
    return result
