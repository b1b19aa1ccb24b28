# SPDX-License-Identifier: Apache-2.0
"""MustDrop's ``official_flat``: tiled pictures view after view, as the authors' code feeds them."""

from __future__ import annotations

import pytest
import torch
from models import prompts, tiny_llava
from models_next import prompts_next, tiny_next

import vlmcompress
from vlmcompress.methods.mustdrop import MustDrop

SIDE, CELLS = 6, 36
NOTHING_LEAVES = {"official_flat": True, "gamma": 0.0}


@pytest.fixture(scope="module")
def model():
    return tiny_next(eos_token_id=None)


@pytest.mark.parametrize(("options", "left"), [({"merge": False}, 36), ({"similarity": -1.0, "window": 2}, 9)])
@torch.no_grad()
def test_views_follow_each_other_without_newlines(model, options, left):
    inputs = prompts_next(model, [[3, "square", 4]])
    views, fed = 5, {}
    text = model.get_input_embeddings()(inputs["input_ids"])[0]
    with vlmcompress.compress(model, "mustdrop", **NOTHING_LEAVES, **options) as handle:
        hooks = [
            model.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: fed.update(rows=a[0])),
            model.model.language_model.register_forward_pre_hook(lambda m, a, k: fed.update(k), with_kwargs=True),
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
    image = handle.last.samples[0].images[0]
    entered = fed["inputs_embeds"][0]
    assert len(entered) == 3 + views * left + 4
    torch.testing.assert_close(entered[3:-4], model.model.multi_modal_projector(fed["rows"]).flatten(0, 1))
    torch.testing.assert_close(torch.cat([entered[:3], entered[-4:]]), torch.cat([text[:3], text[-4:]]))
    fed_order = handle.last.selection.keep[0]
    assert handle.last.layout.view[0, fed_order].tolist() == [v for v in range(views) for _ in range(left)]
    assert not image.is_newline[image.kept].any()
    if left < CELLS:  # every token stands for a window of its own view
        assert [len(s) for s in image.sources] == [4] * views * left
        owners = handle.last.layout.view[0]
        assert all(len(owners[s].unique()) == 1 for s in image.sources)


@torch.no_grad()
def test_batched_equals_single(model):
    inputs = prompts_next(model, [[3, "square", 4], [2, (24, 48), 5]])
    options = {**NOTHING_LEAVES, "gamma": 0.02, "alpha": 0.05, "similarity": -0.1, "window": 2}
    with vlmcompress.compress(model, "mustdrop", **options) as handle:
        both = model(**inputs).logits
        kept = [s.images[0].kept_at(3) for s in handle.last.samples]
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
            alone = {k: inputs[k][row : row + 1, -length:] for k in ("input_ids", "attention_mask")}
            alone |= {k: inputs[k][row : row + 1] for k in ("pixel_values", "image_sizes")}
            torch.testing.assert_close(model(**alone).logits[0], both[row, -length:], atol=1e-4, rtol=1e-4)
            assert handle.last.samples[0].images[0].kept_at(3).equal(kept[row])


def test_padding_has_no_place(model):
    inputs = prompts_next(model, [[3, "wide", 4]])
    with vlmcompress.compress(model, "mustdrop", **NOTHING_LEAVES), pytest.raises(ValueError, match="fill their tiles"):
        model(**inputs)


def test_other_families_are_refused():
    model = tiny_llava()
    before = model(**prompts([[5, "image", 7]], CELLS)).logits
    with pytest.raises(ValueError, match="LLaVA-NeXT"):
        vlmcompress.compress(model, MustDrop(official_flat=True))
    assert model(**prompts([[5, "image", 7]], CELLS)).logits.equal(before)
