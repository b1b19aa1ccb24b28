# SPDX-License-Identifier: Apache-2.0
"""Fair comparisons between the rows of a table: on hard questions, at equal cost, and which rows cannot be told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rows import UNCOMPRESSED
from .stats import Differences, accuracy

#: what a method is compared with at equal cost; each has a curve of budgets that ends in the uncompressed model
BASES = ("random", "grid", "pool", "resize")
#: the two meanings of equal cost: visual tokens per decoder layer, and FLOPs of the whole prefill
COSTS = ("layer_tokens", "full")


@dataclass(frozen=True, eq=False)
class Scored:
    """One row on one task: what each question earned, averaged over seeds, and what the row costs."""

    key: str
    method: str
    keep: int | float | None
    correct: NDArray
    cost: dict[str, float]


def hard_subset(row: Scored, resized: Scored, uncompressed: Scored | None, groups: Sequence[str]) -> dict | None:
    """The row on the questions that the resized picture of the same budget gets wrong; None where there are none."""
    hard = np.flatnonzero(resized.correct < 0.5)
    if not len(hard):
        return None
    mine = accuracy(row.correct[hard], [groups[i] for i in hard])
    return {
        "n": len(hard),
        "accuracy": mine.value,
        "low": mine.low,
        "high": mine.high,
        "uncompressed": None if uncompressed is None else float(uncompressed.correct[hard].mean()),
    }


def at_cost(curve: Sequence[Scored], cost: str, value: float) -> NDArray | None:
    """What each question would earn on a baseline's curve at a cost between two of its budgets.

    Between two budgets it is the mean of drawing one of them for each question so that the cost is met on average, that
    is, a straight line. None outside the curve.
    """
    points = sorted(curve, key=lambda point: point.cost[cost])
    for point in points:
        if np.isclose(point.cost[cost], value, rtol=1e-6):
            return point.correct
    for below, above in pairwise(points):
        if below.cost[cost] < value < above.cost[cost]:
            share = (value - below.cost[cost]) / (above.cost[cost] - below.cost[cost])
            return (1 - share) * below.correct + share * above.correct
    return None


def equal_cost(row: Scored, rows: Sequence[Scored], difference: Differences) -> dict[str, dict[str, dict]]:
    """Accuracy of the row minus that of each baseline at the same cost: cost → baseline → interval."""
    found: dict[str, dict[str, dict]] = {}
    for cost in COSTS:
        for base in BASES:
            curve = [r for r in rows if r.method == base and r.keep is not None]
            if base == row.method or not curve:
                continue
            ends = [r for r in rows if r.method == UNCOMPRESSED]
            there = at_cost([*curve, *ends], cost, row.cost[cost])
            if there is not None:
                found.setdefault(cost, {})[base] = asdict(difference(row.correct, there))
    return found


def ties(task: str, rows: Sequence[Scored], difference: Differences) -> list[dict[str, Any]]:
    """Pairs of rows of one budget whose paired interval holds no difference, the better row first."""
    found = []
    for a, b in combinations([r for r in rows if r.keep is not None], 2):
        if a.keep != b.keep:
            continue
        better, other = (a, b) if a.correct.mean() >= b.correct.mean() else (b, a)
        gap = difference(better.correct, other.correct)
        if gap.low <= 0 <= gap.high:
            found.append({"task": task, "keep": a.keep, "rows": [better.key, other.key], "difference": asdict(gap)})
    return found
