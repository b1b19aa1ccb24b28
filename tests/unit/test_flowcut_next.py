# SPDX-License-Identifier: Apache-2.0
"""FlowCut on tiled images: crops share cuts, images do not, newlines leave, the last cut is inside the language model."""

from __future__ import annotations

import pytest
import torch
from models import BEAMS, IMAGE
from models_next import one_row, prompts_next, tiny_next

import vlmcompress

GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
SPEC = [[5, "square", 7], [2, "wide", 3, "row", 2], [8, "column", 4]]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_next(attention=request.param, eos_token_id=None)


@pytest.mark.parametrize("keep", [12, 0.2])
@torch.no_grad()
def test_batched_equals_single_and_padding_does_not_matter(model, keep):
    left, right = prompts_next(model, SPEC), prompts_next(model, SPEC, side="right")
    width = left["input_ids"].shape[1]
    with vlmcompress.compress(model, "flowcut", keep=keep, every=1) as handle:
        new = model.generate(**left, **GREEDY)[:, width:]
        beams = model.generate(**left, **GREEDY, num_beams=BEAMS)[:, width:]
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp_min(0) for x in (left, right)]
        batch_left = model(**left, position_ids=positions[0]).logits
        records = [[(i.kept, i.kept_at(2)) for i in s.images] for s in handle.last.samples]
        batch_right = model(**right, position_ids=positions[1]).logits
        image = 0
        for row, parts in enumerate(SPEC):
            images = sum(isinstance(part, str) for part in parts)
            alone = one_row(left, row, slice(image, image + images))
            length = alone["input_ids"].shape[1]
            image += images
            logits = model(**alone).logits[0]
            for kept, single in zip(records[row], handle.last.samples[0].images, strict=True):
                assert kept[0].equal(single.kept)
                assert kept[1].equal(single.kept_at(2))
                if keep == 12:
                    assert len(kept[1]) == 12
                    assert not single.is_newline[kept[0]].any()
            torch.testing.assert_close(batch_left[row, -length:], logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(batch_right[row, :length], logits, atol=1e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, length:].equal(new[row])
            assert model.generate(**alone, **GREEDY, num_beams=BEAMS)[0, length:].equal(beams[row])


@torch.no_grad()
def test_a_sliver_that_fits_in_keeps_its_newlines_in_any_batch(model):
    """Its 60 patches fit into 66, those of the other image do not."""
    inputs = prompts_next(model, [[3, (4, 48), 4], [2, "square", 5]])
    alone = one_row(inputs, 0, slice(0, 1))
    before = model(**alone).logits[0]
    with vlmcompress.compress(model, "flowcut", keep=66) as handle:
        logits = model(**inputs).logits[0, -len(before) :]
        sliver, square = (s.images[0] for s in handle.last.samples)
        assert len(sliver.kept) == sliver.n_original == 60 + 2
        assert not square.is_newline[square.kept].any()
    torch.testing.assert_close(logits, before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_budget_that_everything_fits_in_changes_nothing(model):
    inputs = prompts_next(model, SPEC)
    before, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    for keep in (1000, 1.0):
        with vlmcompress.compress(model, "flowcut", keep=keep):
            torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)
            assert model.generate(**inputs, **GREEDY).equal(answer)


@torch.no_grad()
def test_one_patch_per_crop_at_least(model):
    inputs = prompts_next(model, [[5, "square", 7]])
    with vlmcompress.compress(model, "flowcut", keep=1) as handle:
        model(**inputs)
        assert handle.last.layer_tokens == [5, 5, 1, 1]


@torch.no_grad()
def test_without_the_second_cut_the_tower_goes_to_the_budget(model):
    inputs = prompts_next(model, [[5, "square", 7]])
    with vlmcompress.compress(model, "flowcut", keep=20, llm_layer=None) as handle:
        model(**inputs)
        assert handle.last.layer_tokens == [20] * 4


@torch.no_grad()
def test_decoding_equals_recomputing_with_the_kept_set_frozen(model):
    inputs = prompts_next(model, [[5, "wide", 7]])
    length = inputs["input_ids"].shape[1]
    with vlmcompress.compress(model, "flowcut", keep=12, llm_layer=None):
        new = model.generate(**inputs, **GREEDY)
        logits = model(**inputs | {"input_ids": new, "attention_mask": torch.ones_like(new)}).logits[0, length - 1 : -1]
    logits[:, IMAGE] = float("-inf")
    assert logits.argmax(-1).equal(new[0, length:])


def test_the_second_cut_must_save_something(model):
    with pytest.raises(ValueError, match="leaves nothing to save"):
        vlmcompress.compress(model, "flowcut", llm_layer=3)
