# SPDX-License-Identifier: Apache-2.0
"""The scaling law: released table, refits, optimum and evaluations of the reference numbers."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import vectors

from vlmcompress.eval.scaling import (
    BOUNDS,
    VISUAL_REASONING,
    ScalingLaw,
    fit,
    iso_cost,
    optimal_tokens,
    published,
    table,
)

LAW = vectors.folder("quecc") / "scaling_law.json"
given = pytest.mark.skipif(not LAW.exists(), reason="reference vectors are not beside the project")


@given
def test_released_scores_and_exponents():
    numbers = json.loads(LAW.read_text())
    for task, key in (("reasoning", "scores_visual_reasoning"), ("text", "scores_ocr")):
        np.testing.assert_allclose(1 - table(task)[2], np.ravel(numbers[key]), rtol=1e-12)
    assert numbers["printed_by_release"] == VISUAL_REASONING


@given
@pytest.mark.parametrize(("task", "key"), [("reasoning", "visual_d0"), ("text", "ocr_d0")])
def test_refits_with_d_zero(task, key):
    wanted = json.loads(LAW.read_text())[key]
    law = fit(*table(task), d_bounds=(0.0, 0.0))
    for name in ("a", "alpha", "beta", "d", "rmse"):
        assert getattr(law, name) == pytest.approx(wanted[name], rel=1e-3, abs=1e-9), name


@given
@pytest.mark.parametrize(
    ("task", "bounds", "key"),
    [("reasoning", (0.0, 0.3), "continuous_visual_d_0_to_0p3"), ("text", (0.0, 0.3), "continuous_ocr_d_0_to_0p3"),
     ("reasoning", None, "continuous_visual_d_free")],
)  # fmt: skip
def test_other_refits(task, bounds, key):
    wanted = json.loads(LAW.read_text())[key]
    law = fit(*table(task), d_bounds=bounds or (wanted["d"],) * 2)
    assert law.rmse == pytest.approx(wanted["rmse"], rel=1e-3)
    assert law.ratio == pytest.approx(wanted["alpha"] / wanted["beta"], rel=1e-2)


@given
def test_without_the_duplicated_cell():
    wanted = json.loads(LAW.read_text())["ocr_without_the_duplicated_7B_576_cell"]
    law = fit(*(x[:-1] for x in table("text")), d_bounds=(0.0, 0.0))
    assert (law.a, law.alpha, law.beta) == pytest.approx((wanted["a"], wanted["alpha"], wanted["beta"]), rel=1e-3)


@given
def test_evaluations_and_optimum():
    numbers = json.loads(LAW.read_text())
    for row in numbers["evaluations"]:
        assert ScalingLaw(**row["p"]).predict(row["N"], row["T"]) == pytest.approx(row["error"], rel=1e-12)
    for row in numbers["optimal_V"]:
        assert optimal_tokens(row["Q"], row["alpha"], row["beta"]) == pytest.approx(max(1.0, row["V"]))


def test_optimum_is_where_the_error_is_least():
    law = published()
    for q in (25, 50, 200):
        v = np.linspace(1, 576, 20_000)
        error = law.a * (1000 / (q + v)) ** -law.alpha * v**-law.beta  # n of equal cost
        assert v[error.argmin()] == pytest.approx(optimal_tokens(q, law.alpha, law.beta), abs=0.1)
    assert optimal_tokens(50, 0.03, 0.05) == 576  # text: tokens always pay
    assert optimal_tokens(0, 0.077, 0.015) == 1
    assert optimal_tokens(1e6, 0.077, 0.015) == 576


def test_what_to_buy():
    law = published()
    n, v, error = law.best(cost=7 * (50 + 14), q=50)
    assert (n, v) == (7.0, 14) and error == law.predict(7.0, 14)
    small = ScalingLaw(0.9, 0.028, 0.039)  # reading text: the small model with all tokens
    assert small.best(cost=0.5 * 626, q=50, v_max=576)[:2] == (0.5, 576)
    assert iso_cost(100, 10, (1.0, 4.0)) == [(1.0, 90.0), (4.0, 15.0)]
    with pytest.raises(ValueError, match="too small for 50 text tokens and one visual token"):
        law.best(cost=10, q=50)


def test_edges_warn_and_the_ratio_has_an_interval():
    with pytest.warns(UserWarning, match="ended at the edge of the range"):
        fit(*table("text"), bounds=BOUNDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*table("reasoning"), bounds=BOUNDS)
    law = fit(*table(), d_bounds=(0.0, 0.0), resamples=40)
    low, high = law.ratio_interval
    assert low < law.ratio < high and low > 3 and high < 8
    assert law.ratio == pytest.approx(4.7, abs=0.05)


def test_recovers_a_known_law():
    n, v = (x.ravel() for x in np.meshgrid([0.5, 2, 8, 30], [1, 9, 64, 300], indexing="ij"))
    law = fit(n, v, 0.4 * n**-0.12 * v**-0.03 + 0.2, d_bounds=(0.2, 0.2))
    assert (law.a, law.alpha, law.beta) == pytest.approx((0.4, 0.12, 0.03), rel=1e-6)


def test_bad_input():
    for call, message in (
        (lambda: fit([1, 2], [1, 2], [0.1, 0.2]), "at least four"), (lambda: fit([1] * 4, [1] * 4, [1] * 3), "one length"),
        (lambda: fit([0, 1, 2, 3], [1] * 4, [0.1] * 4), "above 0"), (lambda: published("text"), "for 'reasoning' only"),
        (lambda: table("sound"), "reasoning, text, not for 'sound'"), (lambda: optimal_tokens(-1, 0.1, 0.1), "at least 0"),
        (lambda: ScalingLaw(1, 1, 1).predict(0, 1), "n is above 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
