# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcompress.eval.stats import accuracy, mean_sd, retained, wilson


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """200 draws of 60 images with 5 questions of shared difficulty; a per-question interval would cover about 70 %."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        easy = rng.beta(1.5, 1.5, size=60)
        correct = (rng.random((60, 5)) < easy[:, None]).ravel()
        hits += 0.5 in accuracy(correct, np.repeat(np.arange(60), 5).astype(str), resamples=400)
    assert 0.90 <= hits / 200 <= 0.99


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    reference = (rng.random(400) < 0.6).astype(float)
    correct = reference.copy()
    correct[:8] = 0
    groups = [str(i) for i in range(400)]
    paired, alone = retained(correct, reference, groups), accuracy(correct, groups)
    assert paired.high - paired.low < (alone.high - alone.low) / alone.value / 3
    assert 1.0 not in paired
    assert paired.value == correct.sum() / reference.sum()


def test_equal_answers_retain_exactly_everything():
    assert retained([1, 0, 1], [1, 0, 1], ["a", "b", "c"]).value == 1.0


def test_no_certainty_from_a_perfect_score():
    interval = accuracy([1.0] * 20, [str(i) for i in range(20)])
    assert interval.value == 1.0
    assert interval.low == pytest.approx(wilson(20, 20).low)
    assert interval.low < 0.9


def test_nothing_right_in_the_reference_is_no_number():
    assert math.isnan(retained([1, 0], [0, 0], ["a", "b"]).value)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from("abcde")), min_size=1, max_size=40))
def test_the_value_lies_inside(answers):
    correct, groups = zip(*answers, strict=True)
    interval = accuracy(correct, groups, resamples=100)
    assert interval.low - 1e-9 <= interval.value <= interval.high + 1e-9
    assert interval.value == pytest.approx(np.mean(correct))


def test_unpaired_answers_are_refused():
    with pytest.raises(ValueError, match="same questions"):
        retained([1, 0], [1], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        accuracy([], [])


def test_mean_sd():
    assert mean_sd([0.5]) == (0.5, None)
    assert mean_sd([0.4, 0.5, 0.6]) == (pytest.approx(0.5), pytest.approx(0.1))
