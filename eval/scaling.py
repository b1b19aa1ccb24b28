# SPDX-License-Identifier: Apache-2.0
"""How error depends on the size of the language model and on the number of visual tokens, and what to buy for a budget.

The law of Li et al., arXiv 2411.03312: error(N, V) = a · N^-alpha · V^-beta + d with N in billions of parameters and V
visual tokens; the cost of answering is N · (Q + V) with Q text tokens. The published exponents come from LLaVA-NeXT
recipes with Qwen-1.5 of 0.5 to 7 billion parameters and 1 to 576 tokens: they speak of that setting only. Alpha and beta
trade off against d almost freely; their ratio, which decides the best V, is what the data fix.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: printed in the official code for the mean error over nine visual-reasoning benchmarks
VISUAL_REASONING = {"alpha": 0.077, "beta": 0.015}
SIZES = (0.5, 1.8, 4.0, 7.0)
TOKENS = (1, 4, 16, 36, 64, 144, 576)
#: the official code's scores: a row for each of ``SIZES``, a column for each of ``TOKENS``
SCORES = {
    "reasoning": (
        (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
        (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
        (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
        (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
    ),
    # the last one repeats that of 4 B and is missing in another list of theirs; leave it out with ``[:-1]`` on the triples
    "text": (
        (0.09786452795, 0.1182958067, 0.1550942008, 0.1910774145, 0.1941969882, 0.221068366, 0.2608343672),
        (0.1052476426, 0.1374539054, 0.1752941354, 0.2073164965, 0.2205697757, 0.2585236455, 0.3095503029),
        (0.1268003646, 0.155895545, 0.1927482015, 0.2320252514, 0.2603975472, 0.2882145317, 0.3460536811),
        (0.1390784633, 0.1642774799, 0.205, 0.2391638418, 0.2618315143, 0.2880269247, 0.3460536811),
    ),
}  # fmt: skip
#: the official search's bounds
BOUNDS = {"a": (0.2, 0.7), "alpha": (0.0, 0.2), "beta": (0.0, 0.05)}


@dataclass(frozen=True)
class ScalingLaw:
    """error(n, v) = a · n^-alpha · v^-beta + d. ``rmse`` and ``ratio_interval`` (95 %) are set by :func:`fit`."""

    a: float
    alpha: float
    beta: float
    d: float = 0.0
    rmse: float | None = None
    ratio_interval: tuple[float, float] | None = None

    @property
    def ratio(self) -> float:
        """alpha / beta: how much more a larger model gives than more tokens."""
        return self.alpha / self.beta if self.beta else float("inf")

    def predict(self, n: float, v: float) -> float:
        """Error of ``n`` billion parameters that read ``v`` visual tokens."""
        _positive(n=n, v=v)
        return self.a * n**-self.alpha * v**-self.beta + self.d

    def best(self, cost: float, q: float, sizes: Sequence[float] = SIZES, v_max: int = 576) -> tuple[float, int, float]:
        """(parameters, visual tokens, error) with the least error among ``sizes`` at n · (q + v) ≤ ``cost``.

        Every size takes as many tokens as its share of the budget holds. Raises ``ValueError`` when none fits one token.
        """
        rows = [(n, min(v_max, int(v + 1e-9))) for n, v in iso_cost(cost, q, sizes) if v >= 1 - 1e-9]
        if not rows:
            raise ValueError(
                f"A cost of {cost} is too small for {q} text tokens and one visual token at any of the sizes."
            )
        return min(((n, v, self.predict(n, v)) for n, v in rows), key=lambda row: row[2])


def published(task: str = "reasoning") -> ScalingLaw:
    """The law with the published exponents of visual reasoning; a, which is not published, fitted to the scores, d = 0."""
    if task != "reasoning":
        raise ValueError(f"Exponents are published for 'reasoning' only, not for {task!r}; fit the scores yourself.")
    n, v, error = table(task)
    powers = n ** -VISUAL_REASONING["alpha"] * v ** -VISUAL_REASONING["beta"]
    return ScalingLaw(float(powers @ error / (powers @ powers)), **VISUAL_REASONING)


def table(task: str = "reasoning") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The official scores as (billions of parameters, visual tokens, error), 28 of each."""
    if task not in SCORES:
        raise ValueError(f"There are scores for {', '.join(SCORES)}, not for {task!r}.")
    n, v = np.meshgrid(SIZES, TOKENS, indexing="ij")
    return n.ravel(), v.ravel().astype(float), 1 - np.array(SCORES[task]).ravel()


def optimal_tokens(q: float, alpha: float, beta: float, v_max: float = 576) -> float:
    """Visual tokens with the least error at any fixed cost n · (q + v): beta · q / (alpha − beta), from 1 to ``v_max``.

    With beta at or above alpha tokens always pay: ``v_max``. Raises ``ValueError`` for a negative q.
    """
    if q < 0:
        raise ValueError(f"q is a number of text tokens, at least 0, not {q}.")
    return float(v_max) if alpha <= beta else float(min(max(1.0, beta * q / (alpha - beta)), v_max))


def iso_cost(cost: float, q: float, sizes: Sequence[float] = SIZES) -> list[tuple[float, float]]:
    """(parameters, visual tokens) of equal cost n · (q + v) for every size; sizes that leave no token give v ≤ 0."""
    return [(n, cost / n - q) for n in sizes]


def fit(
    n: Sequence[float],
    v: Sequence[float],
    error: Sequence[float],
    d_bounds: tuple[float, float] = (0.0, 0.3),
    *,
    bounds: dict[str, tuple[float, float]] | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> ScalingLaw:
    """Least squares of the law.

    Args:
        n, v, error: one entry per measurement: billions of parameters, visual tokens, 1 − score.
        d_bounds: range of d; equal ends fix it.
        bounds: ranges of a, alpha and beta, such as :data:`BOUNDS`; default: none below 0.
        resamples: bootstrap samples for ``ratio_interval``; 0 leaves it out.
        seed: of the bootstrap.

    Raises:
        ValueError: lengths that differ, fewer than four measurements, sizes or tokens not above 0.

    Warns when a parameter ends at the edge of ``bounds``: it would go further.
    """
    data = [np.asarray(x, dtype=float) for x in (n, v, error)]
    if len({len(x) for x in data}) > 1 or len(data[0]) < 4:
        raise ValueError("A fit takes n, v and error of one length, at least four of each.")
    if (data[0] <= 0).any() or (data[1] <= 0).any():
        raise ValueError("Sizes and token counts are above 0.")
    ranges = {"a": (0.0, np.inf), "alpha": (0.0, np.inf), "beta": (0.0, np.inf)} | (bounds or {})
    found, rmse = _solve(*data, ranges, d_bounds)
    names = list(ranges)
    edges = [k for k, x in zip(names, found, strict=False) if bounds and k in bounds and _at_edge(x, bounds[k])]
    if edges:
        warnings.warn(f"{', '.join(edges)} ended at the edge of the range; the best fit lies outside.", stacklevel=2)
    interval = None
    if resamples:
        rng, ratios = np.random.default_rng(seed), []
        for _ in range(resamples):
            pick = rng.integers(len(data[0]), size=len(data[0]))
            (_, alpha, beta, _), _ = _solve(*(x[pick] for x in data), ranges, d_bounds)
            ratios.append(alpha / max(beta, 1e-12))
        interval = tuple(float(x) for x in np.quantile(ratios, (0.025, 0.975)))
    return ScalingLaw(*map(float, found), rmse=rmse, ratio_interval=interval)


def _solve(n, v, error, ranges, d_bounds) -> tuple[np.ndarray, float]:
    """(a, alpha, beta, d) of least squares, and the root mean square of what is left."""
    from scipy.optimize import least_squares

    low = [ranges[k][0] for k in ("a", "alpha", "beta")]
    high = [ranges[k][1] for k in ("a", "alpha", "beta")]
    fixed = d_bounds[0] == d_bounds[1]
    if not fixed:
        low, high = [*low, d_bounds[0]], [*high, d_bounds[1]]

    def left(p: np.ndarray) -> np.ndarray:
        return p[0] * n ** -p[1] * v ** -p[2] + (d_bounds[0] if fixed else p[3]) - error

    best = None
    for d in [d_bounds[0]] if fixed else np.linspace(*d_bounds, 4):
        start = [max(error.mean() - d, 0.05), 0.05, 0.02, *([] if fixed else [d])]
        start = np.clip(start, np.array(low) + 1e-9, np.array(high) - 1e-9)
        result = least_squares(left, start, bounds=(low, high), xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=2000)
        if best is None or result.cost < best.cost:
            best = result
    p = best.x if not fixed else np.append(best.x, d_bounds[0])
    return p, float(np.sqrt(2 * best.cost / len(error)))


def _at_edge(value: float, bounds: tuple[float, float]) -> bool:
    low, high = bounds
    return min(abs(value - low), abs(high - value)) < 1e-3 * (high - low)


def _positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} is above 0, not {number}.")
