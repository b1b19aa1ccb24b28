# SPDX-License-Identifier: Apache-2.0
"""Token counts that add up to a budget over the layers."""

from __future__ import annotations


def declining_counts(total: float, spans: list[int], weights: list[float], low: int, high: int) -> list[int] | None:
    """Counts in proportion to ``weights``, clamped to ``low … high``, that use up ``total`` token-layers.

    Args:
        total: token-layers to spend: the sum of ``spans[i] * counts[i]`` stays at or below it.
        spans: layers that each count holds for.
        weights: positive, not growing.
        low, high: bounds of every count.

    Returns:
        One count per span, rounded down; None when even ``low`` everywhere is too much.
    """
    if low * sum(spans) > total:
        return None

    def counts(x: float) -> list[float]:
        return [min(high, max(low, x * w)) for w in weights]

    below, above = 0.0, high / min(weights)
    for _ in range(60):
        middle = (below + above) / 2
        if sum(s * c for s, c in zip(spans, counts(middle), strict=True)) <= total:
            below = middle
        else:
            above = middle
    # the margin undoes what bisection leaves below a whole number
    return [int(c + 1e-6) for c in counts(below)]
