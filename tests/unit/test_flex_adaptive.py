# SPDX-License-Identifier: Apache-2.0
"""A count for every image by its detail: the score, the calibration, mixed counts in one batch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from flex_models import GREEDY, N, fresh, native
from models import tiny_llava
from models_next import tiny_next

import vlmcompress
from vlmcompress import flex
from vlmcompress.methods.tokenflex_adaptive import AdaptiveTokenFlex, calibrate_adaptive, detail, shares_for

COUNTS = (4, 9, 36)
SPEC = [[5, "image", 7], [3, "image", 2, "image", 4], [2, "image", 1]]


@pytest.fixture(scope="module")
def model():
    return fresh()


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    """Noise whose fine part grows with the picture's number."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 2, 2, generator=g).repeat_interleave(12, 2).repeat_interleave(12, 3)
    return coarse + torch.linspace(0, 2, n)[:, None, None, None] * torch.randn(n, 3, 24, 24, generator=g)


def test_score():
    flat = torch.arange(4.0).view(2, 2).repeat_interleave(3, 0).repeat_interleave(3, 1).reshape(1, 36, 1)
    assert float(detail(flat, (6, 6), (2, 2))) == pytest.approx(0, abs=1e-6)
    fine = torch.tensor([1.0, -1.0]).repeat(18).view(1, 36, 1)
    assert float(detail(fine, (6, 6), (1, 1))) == pytest.approx(1)
    assert 0.5 < float(detail(fine, (6, 6), (2, 2))) <= 1
    assert float(detail(torch.ones(1, 36, 2), (6, 6), (2, 2))) == 0
    assert detail(flat * 7 + 3, (6, 6), (3, 3)).allclose(detail(flat, (6, 6), (3, 3)), atol=1e-6)


@pytest.mark.parametrize("average", [4, 6, 16.3, 30, 36])
def test_shares_meet_the_average(average):
    shares = shares_for(COUNTS, average)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    assert sum(n * p for n, p in zip(COUNTS, shares, strict=True)) == pytest.approx(average, abs=0.05)
    assert shares_for(COUNTS, 49 / 3) == pytest.approx([1 / 3] * 3, abs=1e-3)


@torch.no_grad()
def test_calibrated_on_one_split_it_meets_the_average_on_another(model):
    method = calibrate_adaptive(model, [{"pixel_values": pictures(60)}], 16, COUNTS)
    counts = []
    inputs = native(N, [[2, "image", 3]] * 60)
    inputs["pixel_values"] = pictures(60, seed=1)
    with vlmcompress.compress(model, method) as handle:
        model(**inputs)
        counts = [len(i.kept) for s in handle.last.samples for i in s.images]
    assert set(counts) == set(COUNTS) and sum(counts) / 60 == pytest.approx(16, abs=2.5)
    assert sum(counts[:20]) < sum(counts[-20:])  # finer pictures get more


@torch.no_grad()
def test_mixed_counts_equal_every_image_alone_at_its_count(model):
    inputs = native(N, SPEC)
    inputs["pixel_values"] = pictures(4)
    method = calibrate_adaptive(model, [{"pixel_values": pictures(40)}], 16, COUNTS)
    with vlmcompress.compress(model, method) as handle:
        logits = model(**inputs).logits[:, -1]
        counts = [[len(i.kept) for i in s.images] for s in handle.last.samples]
        assert len({n for row in counts for n in row}) > 1
        answers = model.generate(**inputs, **GREEDY)[:, -4:]
    for row, image in ((0, 0), (2, 3)):
        real = inputs["attention_mask"][row].bool()
        one = {
            "input_ids": inputs["input_ids"][row, real][None],
            "pixel_values": inputs["pixel_values"][image : image + 1],
        }
        with flex.use(model, counts[row][0]):
            torch.testing.assert_close(model(**one).logits[0, -1], logits[row], atol=1e-5, rtol=1e-4)
            assert model.generate(**one, **GREEDY)[0, -4:].equal(answers[row])


@torch.no_grad()
def test_saved_choice_is_restored(model):
    with vlmcompress.compress(model, AdaptiveTokenFlex(COUNTS, (0.2, math.inf))):
        saved = json.loads(json.dumps(model.config.vlmcompress))
    model.config.vlmcompress = saved
    with vlmcompress.restore(model) as handle:
        assert handle.method.methods[0] == AdaptiveTokenFlex(COUNTS, (0.2, math.inf))


def test_bad_input(model):
    for options, message in (({"counts": (9, 4), "thresholds": (0.5,)}, "counts go up"), ({"counts": ()}, "counts go up"),
                             ({"counts": (4, 9), "thresholds": ()}, "2 counts take 1 thresholds"),
                             ({"counts": (4, 9, 16), "thresholds": (0.5, 0.1)}, "that go up")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            AdaptiveTokenFlex(**options)
    for counts, message in (((4, 10), "10 tokens do not fit"), ((4, 49), "36 patches, too few for 49")):
        with pytest.raises(ValueError, match=message):
            vlmcompress.compress(model, AdaptiveTokenFlex(counts, (0.5,)))
    with pytest.raises(ValueError, match="needs a TokenFLEX projector"):
        vlmcompress.compress(tiny_llava(), AdaptiveTokenFlex((4,), ()))
    tiled = tiny_next()
    flex.install(tiled, counts=COUNTS)
    with pytest.raises(ValueError, match="cuts them into tiles"):
        vlmcompress.compress(tiled, AdaptiveTokenFlex((4,), ()))
    with pytest.raises(ValueError, match="at least one sample"):
        calibrate_adaptive(model, [], 9, COUNTS)
    with pytest.raises(ValueError, match="lies outside the counts, 4 to 36"):
        calibrate_adaptive(model, [{"pixel_values": pictures(2)}], 50, COUNTS)
