# SPDX-License-Identifier: Apache-2.0
"""FlowCut beyond the authors' numbers: batches, padding, several images, beams, identity, options, bad input."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, prompts, row_alone, tiny_llava

import vlmcompress
from vlmcompress.method import create
from vlmcompress.methods.flowcut import FlowCut
from vlmcompress.ops.flowcut import entropy_ratio

N = 36
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_llava(attention=request.param, eos_token_id=None)


@pytest.mark.parametrize("keep", [5, 0.3])
@torch.no_grad()
def test_batched_equals_single_and_padding_does_not_matter(model, keep):
    spec = [[5, "image", 7], [2, "image", 3, "image", 2], [8, "image", 4]]
    left, right = prompts(spec, N), prompts(spec, N, side="right")
    with vlmcompress.compress(model, "flowcut", keep=keep, every=1) as handle:
        new = model.generate(**left, **GREEDY)[:, left["input_ids"].shape[1] :]
        beams = model.generate(**left, **GREEDY, num_beams=2)[:, left["input_ids"].shape[1] :]
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp_min(0) for x in (left, right)]
        batch_left = model(**left, position_ids=positions[0]).logits
        records = [[i.kept for i in s.images] for s in handle.last.samples]
        scores = [[i.scores() for i in s.images] for s in handle.last.samples]
        batch_right = model(**right, position_ids=positions[1]).logits
        for row in range(len(spec)):
            alone = row_alone(left, spec, row)
            length = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for kept, score, single in zip(records[row], scores[row], handle.last.samples[0].images, strict=True):
                assert kept.equal(single.kept)
                assert len(kept) == (5 if keep == 5 else 11)
                torch.testing.assert_close(score, single.scores(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(batch_left[row, -length:], logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(batch_right[row, :length], logits, atol=1e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, length:].equal(new[row])
            assert model.generate(**alone, **GREEDY, num_beams=2)[0, length:].equal(beams[row])


@torch.no_grad()
def test_a_budget_that_everything_fits_in_changes_nothing(model):
    inputs = prompts([[5, "image", 7]], N)
    before = model(**inputs).logits
    for keep in (N, 100, 1.0):
        with vlmcompress.compress(model, "flowcut", keep=keep) as handle:
            assert model(**inputs).logits.equal(before)
            assert handle.last.samples[0].images[0].kept.tolist() == list(range(N))
            assert handle.last.compressor_flops == 0


@torch.no_grad()
def test_shallow_cuts_can_be_skipped_and_the_cost_is_reported(model):
    inputs = prompts([[5, "image", 7]], N)
    with vlmcompress.compress(model, "flowcut", keep=5, every=1) as handle:
        model(**inputs)
        early, cost = handle.last.tower_tokens, handle.last.compressor_flops
    with vlmcompress.compress(model, "flowcut", keep=5, every=1, first_prune_layer=1) as handle:
        model(**inputs)
        assert handle.last.tower_tokens[1] == N + 1 > early[1]
        assert handle.last.tower_tokens[2] == early[2] == 6
        assert handle.last.compressor_flops > cost > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_low_precision_scores_in_fp32(dtype):
    model, inputs = tiny_llava().to(dtype), prompts([[5, "image", 7]], N)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vlmcompress.compress(model, "flowcut", keep=5) as handle:
        assert model(**inputs).logits.dtype == dtype
        assert handle.last.scores.dtype == torch.float32


@torch.no_grad()
def test_double_precision_models_in_ragged_batches(model):
    """Images that drop different numbers are padded inside the tower, with the mask's own smallest number."""
    inputs = prompts([[5, "image", 7], [2, "image", 4]], N, side="right")
    with vlmcompress.compress(model, "flowcut", keep=3, every=1) as handle:
        model(**inputs)
        kept = [s.images[0].kept for s in handle.last.samples]
        model.double()
        try:
            model(**{**inputs, "pixel_values": inputs["pixel_values"].double()})
        finally:
            model.float()
        assert [s.images[0].kept.tolist() for s in handle.last.samples] == [k.tolist() for k in kept]


def test_features_of_several_layers_are_refused():
    model = tiny_llava()
    model.config.vision_feature_layer = [-4, -2]
    with pytest.raises(ValueError, match="vision layer 0 too"):
        vlmcompress.compress(model, "flowcut", keep=5)


def test_no_attention_on_a_patch_is_no_error():
    weights = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert float(entropy_ratio(weights, torch.tensor([4]))) == pytest.approx(0.5)


def test_without_the_second_cut_it_composes(model):
    with pytest.raises(ValueError, match="both choose tokens between decoder layers"):
        FlowCut(keep=9) + create("fastv", keep=3)
    both = FlowCut(keep=9, llm_layer=None) + create("fastv", keep=3)
    with torch.no_grad(), vlmcompress.compress(model, both) as handle:
        model(**prompts([[5, "image", 7]], N))
        assert handle.last.layer_tokens == [9, 9, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keeps nothing"),
        ({"history": 1.5}, "between 0 and 1"),
        ({"every": 0}, "at least 1"),
        ({"first_prune_layer": -1}, "counted from 0"),
        ({"first_prune_layer": 2}, "lies behind layer 1"),
        ({"llm_layer": -1}, "counted from 0"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(ValueError, match=message):
        vlmcompress.compress(model, "flowcut", **options)
    assert not model._forward_hooks
