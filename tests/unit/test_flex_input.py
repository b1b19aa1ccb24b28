# SPDX-License-Identifier: Apache-2.0
"""What TokenFLEX refuses, each in one sentence and before anything is changed."""

from __future__ import annotations

import pytest
import torch
from flex_models import GREEDY, IMAGE, N, fresh, native, tiny_siglip
from models import tiny_llava
from models_qwen import tiny_qwen

import vlmcompress
from vlmcompress import flex


@pytest.fixture(scope="module")
def model():
    return fresh()


@pytest.mark.parametrize(
    ("options", "message"),
    [(dict(counts=(4, 10)), "10 tokens do not fit a square grid of patches"), (dict(counts=(0, 4)), "at least 1"),
     (dict(counts=()), "whole numbers of at least 1"), (dict(counts=(9, 4)), "counts go up"),
     (dict(counts=(4, 4)), "each named once"), (dict(counts=(4.0,)), "whole numbers"),
     (dict(counts=(4, 9), probabilities=(0.5, 0.6)), "2 shares that add up to 1"),
     (dict(counts=(4, 9), probabilities=(1.0,)), "one for each count"),
     (dict(counts=(4, 9), num_image_tokens=7), "7 tokens do not fit"), (dict(pooling="max"), "pooling is one of")],
)  # fmt: skip
def test_bad_install_leaves_the_model_alone(options, message):
    model = tiny_llava()
    stock = model.model.multi_modal_projector
    with pytest.raises(ValueError, match=message):
        flex.install(model, **options)
    assert model.model.multi_modal_projector is stock and not hasattr(model.config, "tokenflex")


@torch.no_grad()
def test_bad_counts(model):
    for keep, message in ((10, "10 tokens do not fit a square grid"), (0, "keeps nothing"), (-1, "keeps nothing")):
        with pytest.raises(ValueError, match=message):
            vlmcompress.compress(model, "tokenflex", keep=keep)
    for tokens, message in (
        (10, "do not fit a square grid"),
        (0, "at least 1"),
        (49, "has 36 patches .* too few for 49"),
    ):
        with pytest.raises(ValueError, match=message):
            flex.use(model, tokens)
    with pytest.raises(ValueError, match="10 tokens do not fit a square grid"):
        model(**native(10))
    with pytest.raises(ValueError, match="10 tokens do not fit a square grid"):
        model.generate(**native(10), **GREEDY)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        flex.set_tokens(object(), 0)
    with pytest.raises(ValueError, match="dict counts its placeholders by the size"):
        flex.set_tokens({}, 4)


@torch.no_grad()
def test_mixed_counts_in_one_batch_are_refused(model):
    inputs = native(9, [[5, "image", 7], [3, "image", 4]])
    mixed = inputs["input_ids"].clone()
    here = (mixed[0] == IMAGE).nonzero()[:, 0]
    mixed[0, here[4:]] = 5
    with pytest.raises(ValueError, match="4, 9 image placeholders for 2 views; in one batch every view takes the same"):
        model(**{**inputs, "input_ids": mixed})


@torch.no_grad()
def test_a_prompt_of_another_count_is_refused_not_pooled_twice(model):
    with vlmcompress.compress(model, "tokenflex", keep=4), pytest.raises(ValueError, match="places for 16 tokens only"):
        model(**native(16))
    with vlmcompress.compress(model, "vtc-cls", keep=4):
        with pytest.raises(ValueError, match="'vtc-cls' chooses among the tower's patches"):
            model(**native(16))
        model(**native(N))


def test_wrong_models_are_refused(tmp_path):
    model = tiny_llava()
    with pytest.raises(ValueError, match="needs a TokenFLEX projector, and this model has LlavaMultiModalProjector"):
        vlmcompress.compress(model, "tokenflex", keep=4)
    with vlmcompress.compress(model, "random", keep=4), pytest.raises(ValueError, match=r"call handle\.remove"):
        flex.install(model, counts=(4, 9))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no TokenFLEX projector .*no 'tokenflex'"):
        flex.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no projector of its own"):
        flex.install(tiny_qwen(), counts=(4, 9))
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="feeds the CLS token"):
        flex.install(model, counts=(4, 9))
    with pytest.raises(ValueError, match="cuts off its first patch"):
        vlmcompress.compress(tiny_siglip("default"), "random", keep=4)


def test_counts_outside_the_trained_range_warn():
    model = tiny_llava()
    flex.install(model, counts=(9, 16))
    with pytest.warns(UserWarning, match=r"4 tokens lie outside the counts .*\(9 to 16\)"):
        vlmcompress.compress(model, "tokenflex", keep=4).remove()
