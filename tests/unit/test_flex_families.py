# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX on InternVL (tiles without newlines, native prompts of any count) and LLaVA-OneVision (packed crops)."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE
from models_tiles import FAMILIES, Family, internvl, prompts
from models_video import prompts_video, tiny_onevision

import vlmcompress
from vlmcompress import flex

GREEDY = dict(max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])
SPEC = [[3, (2, 1), 4], [2, (0, 0), 6]]


def tiles(model, tokens: int):
    """Prompts with ``tokens`` places per tile; the same pictures whatever the number."""
    return prompts(Family(internvl, tokens=tokens, tiled=True), model, SPEC)


@pytest.fixture(scope="module")
def model():
    model = internvl()
    flex.install(model, counts=(4, 16, 64))
    return model


@pytest.mark.parametrize("tokens", [4, 9, 16, 64])
@torch.no_grad()
def test_internvl_native_prompts_and_use_agree(model, tokens):
    wanted = model(**tiles(model, tokens)).logits[:, -1]
    answers = model.generate(**tiles(model, tokens), **GREEDY)[:, -3:]
    stock = tiles(model, 64)  # every patch a place: there is no pixel shuffle any more
    with flex.use(model, tokens) as handle:
        torch.testing.assert_close(model(**stock).logits[:, -1], wanted, atol=1e-4, rtol=1e-4)
        assert handle.last.layer_tokens[0] == tokens * (3 + 1)
        assert [len(i.kept) for s in handle.last.samples for i in s.images] == [3 * tokens, tokens]
        assert model.generate(**stock, **GREEDY)[:, -3:].equal(answers)


@torch.no_grad()
def test_internvl_by_hand(model):
    inputs = tiles(model, 16)
    model(**inputs)
    seen = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state[:, 1:]
    pooled = torch.nn.functional.adaptive_avg_pool2d(seen.mT.unflatten(2, (8, 8)), 4).flatten(2).mT
    wanted = model.model.multi_modal_projector.mlp(pooled)
    got = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_internvl_saves_and_loads(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = flex.from_pretrained(tmp_path).eval()
    assert again.config.downsample_ratio == 1.0
    assert again(**tiles(model, 9)).logits.equal(model(**tiles(model, 9)).logits)
    assert FAMILIES["internvl"].tokens == 16  # what the stock model makes of a tile


@pytest.mark.parametrize("tokens", [4, 9])
@torch.no_grad()
def test_onevision_pools_every_view(tokens):
    model = tiny_onevision()
    flex.install(model, counts=(4, 9), apply_post_layernorm=True)
    inputs = prompts_video(model, [[5, "square", 7]])
    with flex.use(model, tokens) as handle:
        logits = model(**inputs).logits
        image = handle.last.samples[0].images[0]
        views = len(image.views[~image.is_newline].unique())
        assert int((~image.is_newline[image.kept]).sum()) == tokens * views
        assert logits[:, -1].isfinite().all()


@torch.no_grad()
def test_onevision_pictures_and_videos_that_are_resized_behind_the_projector_are_refused():
    model = tiny_onevision()
    flex.install(model, counts=(4, 9))
    for part in ("huge", ("video", 2)):
        inputs = prompts_video(model, [[5, part, 7]])
        with (
            vlmcompress.compress(model, "tokenflex", keep=4, per_view=True),
            pytest.raises(ValueError, match="resizes this picture or video behind its projector"),
        ):
            model(**inputs)
