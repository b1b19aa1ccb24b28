# SPDX-License-Identifier: Apache-2.0
"""Intervals that respect how the answers were drawn: by image, and paired with the uncompressed model's answers.

Several questions are asked about one image and their answers stand or fall together, so every interval resamples
images, not questions. A method is compared with the uncompressed model on the same questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    """A value with the bounds of its interval, in the value's own unit."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def _by_group(values: Sequence[float], groups: Sequence[str]) -> tuple[NDArray, NDArray]:
    """Sum of the values and number of them in each group."""
    if len(values) != len(groups) or not len(values):
        raise ValueError(f"An interval needs one group per answer and at least one: {len(values)} and {len(groups)}.")
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros(index.max() + 1)
    np.add.at(sums, index, np.asarray(values, dtype=float))
    return sums, np.bincount(index).astype(float)


def wilson(correct: int, n: int, level: float = 0.95) -> Interval:
    """Wilson interval of a share of ``n`` independent answers."""
    from scipy.stats import binomtest

    interval = binomtest(correct, n).proportion_ci(level, method="wilson")
    return Interval(correct / n, float(interval.low), float(interval.high))


def _bootstrap(data: tuple[NDArray, ...], statistic, resamples: int, seed: int, level: float) -> tuple[float, float]:
    from scipy.stats import bootstrap

    found = bootstrap(
        data, statistic, paired=True, vectorized=True, n_resamples=resamples, confidence_level=level,
        method="percentile", rng=np.random.default_rng(seed), batch=500,
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def accuracy(
    correct: Sequence[float], groups: Sequence[str], *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of ``correct`` (0 … 1 per question) with its interval, resampled by image (``groups``).

    Where resampling shows no spread (everything right or wrong, or a single image) the Wilson interval stands in, for
    a bootstrap would claim certainty.
    """
    sums, counts = _by_group(correct, groups)
    value = float(sums.sum() / counts.sum())
    if len(sums) < 2 or np.ptp(sums / counts) == 0:
        return wilson(round(value * len(correct)), len(correct), level)
    low, high = _bootstrap(
        (sums, counts), lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis), resamples, seed, level
    )
    return Interval(value, low, high)


def retained(
    correct: Sequence[float], reference: Sequence[float], groups: Sequence[str],
    *, resamples: int = 2000, seed: int = 0, level: float = 0.95,
) -> Interval:  # fmt: skip
    """Share of the uncompressed model's accuracy (``reference``, same questions in the same order) that is left.

    ``nan`` where the uncompressed model answers nothing right. Raises ``ValueError`` when the questions differ in
    number.
    """
    if len(correct) != len(reference):
        raise ValueError(
            f"Paired answers must be to the same questions; there are {len(correct)} and {len(reference)}."
        )
    ours, _ = _by_group(correct, groups)
    theirs, _ = _by_group(reference, groups)
    if theirs.sum() == 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    value = float(ours.sum() / theirs.sum())
    if len(ours) < 2 or np.array_equal(ours, theirs):
        return Interval(value, value, value)

    def ratio(a, b, axis):
        # a resample without a single right reference answer says nothing: it counts as no change
        below = b.sum(axis=axis)
        return np.divide(a.sum(axis=axis), below, out=np.ones_like(below), where=below > 0)

    low, high = _bootstrap((ours, theirs), ratio, resamples, seed, level)
    return Interval(value, low, high)


class Differences:
    """Paired differences of many rows on the same questions, all resampled alike.

    Resampling draws images with replacement; how often each is drawn is multinomial, so one table of counts serves every
    pair of rows.

    Args:
        groups: the image of each question.
        resamples, seed, level: of the percentile bootstrap.
    """

    def __init__(self, groups: Sequence[str], *, resamples: int = 2000, seed: int = 0, level: float = 0.95):
        _, self._index = np.unique(np.asarray(groups), return_inverse=True)
        self._size = int(self._index.max()) + 1 if len(groups) else 0
        if not self._size:
            raise ValueError("A difference needs at least one question.")
        drawn = np.random.default_rng(seed).multinomial(self._size, np.full(self._size, 1 / self._size), size=resamples)
        self._drawn: NDArray = drawn.astype(float)
        self._questions: NDArray = self._drawn @ np.bincount(self._index).astype(float)
        self._level = level

    def __call__(self, a: Sequence[float] | NDArray, b: Sequence[float] | NDArray) -> Interval:
        """Mean of ``a - b`` over the questions, with its interval; ``ValueError`` when the questions differ in number."""
        if not len(a) == len(b) == len(self._index):
            raise ValueError(
                f"Paired answers must be to the same questions; there are {len(a)}, {len(b)} and {len(self._index)}."
            )
        gaps = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
        sums = np.bincount(self._index, weights=gaps, minlength=self._size)
        low, high = np.quantile((self._drawn @ sums) / self._questions, [(1 - self._level) / 2, (1 + self._level) / 2])
        return Interval(float(gaps.mean()), float(low), float(high))


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the sample standard deviation where there are at least two values."""
    values = [float(v) for v in values]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
