# SPDX-License-Identifier: Apache-2.0
"""One budget and one ranking over all images of a prompt, in cuts between decoder layers (``pooled``)."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, prompts, row_alone, tiny_llava
from models_qwen import prompts_qwen, tiny_qwen

import vlmcompress
from vlmcompress.methods.transprune import TransPrune

N = 36
SPEC = [[5, "image", 3, "image", 7], [2, "image", 4], [3, "image", 2, "image", 2, "image", 5]]
IMAGES = [2, 1, 3]
CUTS = {"layers": (1, 3), "fractions": (0.5, 0.25)}
GREEDY = dict(max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])


@pytest.fixture(scope="module")
def model():
    return tiny_llava(eos_token_id=None, num_hidden_layers=5)


@torch.no_grad()
def test_transprune_keeps_the_best_of_all_images(model):
    inputs = prompts(SPEC, N)
    with vlmcompress.compress(model, "transprune", pooled=True, **CUTS) as handle:
        model(**inputs)
        samples = handle.last.samples
    uneven = 0
    for sample, images in zip(samples, IMAGES, strict=True):
        kept = [image.kept_at(1) for image in sample.images]
        assert sum(map(len, kept)) == N * images // 2
        assert sum(len(image.kept_at(3)) for image in sample.images) == N * images // 4
        uneven += len({len(k) for k in kept}) > 1
        scores = torch.stack([image.scores()[:N] for image in sample.images])
        chosen = torch.stack([torch.zeros(N, dtype=torch.bool).index_fill(0, k, True) for k in kept])
        assert scores[chosen].min() >= scores[~chosen].max()
        assert float(scores.sum()) == pytest.approx(1.0, abs=1e-4)
    assert uneven  # the budget is not simply split


@torch.no_grad()
def test_batched_equals_single_and_beams(model):
    inputs = prompts(SPEC, N)
    with vlmcompress.compress(model, "transprune", pooled=True, keep=20) as handle:
        logits = model(**inputs).logits
        new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        beams = model.generate(**inputs, **GREEDY, num_beams=2)[:, inputs["input_ids"].shape[1] :]
        for row in range(len(SPEC)):
            alone = row_alone(inputs, SPEC, row)
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(model(**alone).logits[0], logits[row, -length:], atol=1e-4, rtol=1e-4)
            assert sum(handle.last.layer_tokens) / 5 == pytest.approx(20 * IMAGES[row], abs=IMAGES[row])
            assert model.generate(**alone, **GREEDY)[0, length:].equal(new[row])
            assert model.generate(**alone, **GREEDY, num_beams=2)[0, length:].equal(beams[row])


@torch.no_grad()
def test_one_image_is_as_ever(model):
    inputs = prompts([[5, "image", 7]], N)
    logits = []
    for pooled in (False, True):
        with vlmcompress.compress(model, TransPrune(pooled=pooled, **CUTS)):
            logits.append(model(**inputs).logits)
    assert logits[0].equal(logits[1])


@pytest.mark.parametrize("pooled", [False, True])
@torch.no_grad()
def test_flowcut_second_cut(pooled):
    model = tiny_qwen(family="qwen2_vl")
    inputs = prompts_qwen([[2, (4, 6), 3, (6, 6), 2, (6, 4), 4]])
    with vlmcompress.compress(model, "flowcut", keep=4, pooled=pooled) as handle:
        model(**inputs)
        images = handle.last.samples[0].images
        counts = [len(image.kept_at(2)) for image in images]
    assert sum(counts) == 12
    assert (counts == [4, 4, 4]) is not pooled
