# SPDX-License-Identifier: Apache-2.0
"""QuoTA on videos: budgets, what the language model is fed, batches, scores and where they come from."""

from __future__ import annotations

import math

import pytest
import torch
from models import IMAGE
from models_qwen import tiny_qwen
from models_video import BUILDERS, VIDEO, features, prompts_video, row_of, tiny_next_video, tiny_onevision
from PIL import Image

import vlmcompress
from vlmcompress.eval.loading import load
from vlmcompress.methods.quota import QuoTA
from vlmcompress.ops.frames import resize_bilinear
from vlmcompress.quota import FrameScorer, decoupled, letter_id, parse_objects, without_options

GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
CLIP = ("video", 4)
P = (0.9, 0.1, 0.6, 0.01)


def kept(handle, row=0, image=0):
    return handle.last.samples[row].images[image]


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v4", "v5"])
@torch.no_grad()
def test_frames_share_the_budget(family, version):
    model = BUILDERS[family]()
    inputs = prompts_video(model, [[5, CLIP, 4]])
    patches = 9
    budget = 2 * patches
    with vlmcompress.compress(model, "quota", keep=budget, scores=(P,), version=version) as handle:
        model.generate(**inputs, **GREEDY)
        image = kept(handle)
        tokens = image.kept[~image.is_newline[image.kept]]
        per_frame = torch.bincount(tokens // patches, minlength=4).tolist()
        counts = QuoTA(keep=budget).counts(torch.tensor(P), budget, [patches] * 4)
    assert sum(counts) == budget and counts[0] == patches and counts[3] == 0
    if version in ("v3", "v4"):
        assert per_frame == counts
    else:
        assert per_frame == [h * w for h, w in QuoTA(keep=budget).grids(counts, (3, 3))]
    assert int(image.is_newline[image.kept].sum()) == (family == "llava_onevision")


@torch.no_grad()
def test_what_the_language_model_is_fed():
    """Every frame is the bilinear resize of the tokens that the stock model would feed."""
    model = tiny_onevision()
    inputs = prompts_video(model, [[5, CLIP, 4]])
    _, (stock,) = features(model, inputs)
    fed = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with vlmcompress.compress(model, "quota", keep=18, scores=(P,)):
        model(**inputs)
    method = QuoTA(keep=18)
    grids = method.grids(method.counts(torch.tensor(P), 18, [9] * 4), (3, 3))
    frames = stock[:-1].view(4, 1, 3, 3, -1)
    rows = [resize_bilinear(frame, h, w)[0] for frame, (h, w) in zip(frames, grids, strict=True) if h * w]
    expected = torch.cat([*rows, stock[-1:]])
    torch.testing.assert_close(fed[0][0, 5 : 5 + len(expected)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v4"])
@torch.no_grad()
def test_batched_equals_one_by_one(version):
    model = tiny_next_video()
    spec = [[5, CLIP, 2], [2, CLIP, 6]]
    inputs = prompts_video(model, spec)
    scores = (P, P[::-1])
    with vlmcompress.compress(model, "quota", keep=13, scores=scores, version=version):
        both = model.generate(**inputs, **GREEDY)[:, -4:]
    for row in range(2):
        with vlmcompress.compress(model, "quota", keep=13, scores=(scores[row],), version=version):
            alone = model.generate(**row_of(inputs, spec, row), **GREEDY)[:, -4:]
        assert alone.equal(both[row : row + 1])


@torch.no_grad()
def test_everything_kept_is_the_stock_model():
    model = tiny_next_video()
    inputs = prompts_video(model, [[5, CLIP, 4], [3, "wide", 2]])
    stock = model(**inputs).logits
    with vlmcompress.compress(model, "quota", scores=(P,)):
        assert model(**inputs).logits.equal(stock)
    with vlmcompress.compress(model, "quota", keep=9, scores=(P,)) as handle:
        model(**inputs)
        picture = kept(handle, 1)
        assert len(picture.kept) == picture.n_original  # tiled images pass whole
    assert model(**inputs).logits.equal(stock)


@torch.no_grad()
def test_a_function_gets_the_pixels_of_each_video():
    model = tiny_next_video()
    inputs = prompts_video(model, [[5, CLIP, 2], [2, CLIP, 6]])
    seen = []

    def scorer(pixels):
        seen.append(pixels)
        return pixels.flatten(1).mean(1).sigmoid()

    with vlmcompress.compress(model, "quota", keep=12, scores=scorer) as handle:
        model(**inputs)
        assert "scores" not in model.config.vlmcompress["methods"][0]["options"]
        assert len(kept(handle, 1).kept) <= 12
    assert torch.stack(seen).equal(inputs["pixel_values_videos"])


@torch.no_grad()
def test_released_rounding_loses_tokens():
    model = tiny_next_video()
    inputs = prompts_video(model, [[5, CLIP, 4]])
    lengths = {}
    for rounding in ("exact", "truncate"):
        with vlmcompress.compress(model, "quota", keep=19, scores=((0.7, 0.6, 0.6, 0.5),), rounding=rounding) as handle:
            model(**inputs)
            lengths[rounding] = len(kept(handle).kept)
    assert lengths["truncate"] < lengths["exact"] <= 19
    method = QuoTA(keep=3, rounding="truncate")
    assert method.counts(torch.full((4,), 0.5), 3, [9] * 4) == [1, 1, 1, 0]  # the code is left without a frame


@torch.no_grad()
def test_merged_frames_are_scored_by_their_mean():
    tokens = type("Tokens", (), {"layout": type("Layout", (), {"kind": ["video"]})})
    assert QuoTA(scores=(P,)).scores_of(tokens, 0, 2, {}).tolist() == pytest.approx([0.5, 0.305])
    with pytest.raises(ValueError, match="4 scores for a video of 3"):
        QuoTA(scores=(P,)).scores_of(tokens, 0, 3, {})
    with pytest.raises(ValueError, match="scores of 0 videos"):
        QuoTA(scores=()).scores_of(tokens, 0, 3, {})


def test_bad_options():
    for said, options in (
        ("version is one of", {"version": "v6"}),
        ("rounding is", {"rounding": "up"}),
        ("exponent is", {"exponent": 0}),
        ("one sequence of numbers", {"scores": (0.5, 0.4)}),
        ("keep is a number", {"keep": 0}),
    ):
        with pytest.raises(ValueError, match=said):
            QuoTA(**options)
    assert vlmcompress.compress(tiny_qwen(), "quota", keep=9).method.name == "quota"


# scores -----------------------------------------------------------------------------------------------------------
def test_objects_of_a_reply():
    for reply, objects in (
        ('Step 1: Yes\nStep 2: ["a cat", "joy"]\nStep 3: ["A Cat"]', ["a cat"]),
        ("step 1: yes step 3: ['red car', 'man', 'man']", ["red car", "man"]),
        ("Step 1: yes\nStep 3: [dog, it's bowl]", ["dog", "it's bowl"]),
        ("Step 1: no\nStep 2: null\nStep 3: null", None),
        ('Step 1: no\nStep 3: ["cat"]', None),
        ("Step 3: []", None),
        ("I do not know.", None),
        ("step 3: [__import__('os').getcwd()]", ["__import__('os').getcwd()"]),
    ):
        assert parse_objects(reply) == objects, reply
    asked = []
    assert decoupled(lambda prompt: asked.append(prompt) or "step 3: [hat]", "Where is {it}?\nA. here\nB. there") == [
        "hat"
    ]
    assert asked[0].endswith("Question: Where is {it}?\n")
    assert without_options("A. only options") == "A. only options"


@torch.no_grad()
def test_frames_scored_by_the_model(tiny_folder):
    model, processor = load(str(tiny_folder))
    generator = torch.Generator().manual_seed(0)
    frames = [
        Image.fromarray(torch.randint(0, 256, (48, 48, 3), generator=generator, dtype=torch.uint8).numpy())
        for _ in range(3)
    ]
    calls = []
    model.model.register_forward_pre_hook(lambda *args: calls.append(1))
    scorer = FrameScorer(model, processor, batch=2, letter="yes")
    scores = scorer([frames[0], frames[1], frames[0], frames[2]], "is there a star ?", ["star"])
    assert len(calls) == 2 and scores[0] == scores[2] and len(set(scores)) == 3
    prompt = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": scorer.any_of.format(objects="star")}],
            }
        ],
        add_generation_prompt=True,
    )
    logits = model(**processor(images=frames[1], text=prompt, return_tensors="pt")).logits[0, -1]
    assert math.isclose(scores[1], float(logits.softmax(-1)[letter_id(processor.tokenizer, "yes")]), rel_tol=1e-4)
    with pytest.raises(ValueError, match="no single token"):
        FrameScorer(model, processor, letter="quetzalcoatl")
