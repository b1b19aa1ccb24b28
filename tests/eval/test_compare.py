# SPDX-License-Identifier: Apache-2.0
"""Comparisons whose right answer is known."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from vlmcompress.eval import table
from vlmcompress.eval.compare import Scored, at_cost, equal_cost, hard_subset, ties
from vlmcompress.eval.stats import Differences, Interval

GROUPS = [f"image{i // 2}" for i in range(400)]


def scored(method, keep, share, cost, seed=0):
    """A row that answers ``share`` of the 400 questions, the easy ones first."""
    order = np.random.default_rng(seed).permutation(400)
    correct = np.zeros(400)
    correct[order[: round(400 * share)]] = 1
    return Scored(f"{method}-{keep}", method, keep, correct, {"layer_tokens": cost, "full": 10 * cost})


def test_the_interval_is_the_one_of_the_bootstrap():
    rng = np.random.default_rng(3)
    a, b = (rng.random(400) < 0.7).astype(float), (rng.random(400) < 0.6).astype(float)
    found = Differences(GROUPS, resamples=4000)(a, b)
    gaps = (a - b).reshape(200, 2).mean(axis=1)
    theirs = bootstrap((gaps,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    assert found.value == pytest.approx((a - b).mean())
    assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.006)
    assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.006)


def test_images_of_different_size_weigh_by_their_questions():
    groups = ["a", "a", "a", "b"]
    found = Differences(groups, resamples=500)([1, 1, 1, 0], [0, 0, 0, 0])
    assert found.value == 0.75
    assert (found.low, found.high) == (0.0, 1.0)  # only "b", only "a"


def test_a_difference_wants_the_same_questions():
    with pytest.raises(ValueError, match="same questions"):
        Differences(GROUPS)([1.0], [0.0])
    with pytest.raises(ValueError, match="at least one"):
        Differences([])


def test_equal_answers_differ_by_nothing():
    row = scored("grid", 16, 0.5, 16)
    assert Differences(GROUPS)(row.correct, row.correct) == Interval(0.0, 0.0, 0.0)


def test_the_hard_subset_is_what_the_resized_picture_gets_wrong():
    resized, whole = scored("resize", 16, 0.6, 16), scored("none", None, 0.9, 144)
    row = scored("vtc-cls", 16, 0.8, 16)
    found = hard_subset(row, resized, whole, GROUPS)
    # the same order of difficulty: of the 40 % that resize misses, the row answers 20 of 40 and the whole model 30 of 40
    assert found["n"] == 160
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["uncompressed"] == pytest.approx(0.75)
    assert found["low"] < 0.5 < found["high"]
    assert hard_subset(resized, resized, whole, GROUPS)["accuracy"] == 0
    assert hard_subset(row, scored("resize", 16, 1.0, 16), whole, GROUPS) is None


def test_between_two_budgets_a_baseline_is_a_straight_line():
    few, many = scored("grid", 16, 0.5, 20), scored("grid", 48, 0.9, 60)
    assert at_cost([few, many], "layer_tokens", 30).mean() == pytest.approx(0.6)
    assert at_cost([many, few], "full", 500).mean() == pytest.approx(0.8)
    assert at_cost([few, many], "layer_tokens", 60) is many.correct
    assert at_cost([few, many], "layer_tokens", 10) is None
    assert at_cost([few, many], "layer_tokens", 61) is None


def test_equal_cost_compares_with_the_baseline_at_that_cost_not_at_that_keep():
    """A method that prunes late keeps 16 tokens but costs as much as a baseline with 80."""
    late = scored("fastv", 16, 0.8, 80)
    rows = [scored("none", None, 0.9, 144), late, scored("grid", 16, 0.4, 16), scored("grid", 48, 0.85, 48)]
    found = equal_cost(late, rows, Differences(GROUPS))
    # at 80 of 48 … 144 tokens the line of grid stands at 0.85 + 1/3 of 0.05
    assert found["layer_tokens"]["grid"]["value"] == pytest.approx(0.8 - (0.85 + 0.05 / 3), abs=1e-6)
    assert found["full"]["grid"]["value"] == pytest.approx(found["layer_tokens"]["grid"]["value"])
    assert set(found["full"]) == {"grid"}


def test_ties_are_pairs_of_one_budget():
    rows = [
        scored("none", None, 0.9, 144), scored("a", 16, 0.60, 16), scored("b", 16, 0.61, 16, seed=1),
        scored("c", 16, 0.2, 16, seed=2), scored("d", 48, 0.6, 48),
    ]  # fmt: skip
    found = ties("toy", rows, Differences(GROUPS))
    assert [tie["rows"] for tie in found] == [["b-16", "a-16"]]
    assert found[0]["difference"]["value"] == pytest.approx(0.01)


def test_the_table_warns():
    def row(key, keep, accuracy, empty=0.0):
        return {"key": key, "method": key, "keep": keep, "tasks": {"toy": {"accuracy": accuracy, "empty": empty}}}

    tie = {"task": "toy", "keep": 16, "rows": ["b", "a"], "difference": {"value": 0.01, "low": -0.1, "high": 0.1}}
    report = {"rows": [row("none", None, 0.0, 1.0), row("a", 16, 0.6), row("b", 16, 0.61), row("c", 16, 0.2)]}
    report["ties"] = [tie]
    assert table.warnings(report) == [
        "The uncompressed model answers nothing to most questions of toy: its numbers mean little.",
        "toy, keep 16: the best row, b, cannot be told apart from a.",
    ]
