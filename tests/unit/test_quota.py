# SPDX-License-Identifier: Apache-2.0
"""QuoTA on videos: budgets, what the language model is fed, batches, scores and where they come from."""

from __future__ import annotations

import math

import pytest
import torch
from models import IMAGE
from models_qwen import tiny_qwen
from models_video import BUILDERS, VIDEO, prompts_video, row_of, tiny_next_video, tiny_onevision
from PIL import Image

import vlmcompress
from vlmcompress.eval.loading import load
from vlmcompress.methods.quota import QuoTA
from vlmcompress.ops.frames import resize_bilinear
from vlmcompress.pooled import apart
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
    patches, budget = 9, 18
    # in front of its own pooling, to 3 × 3, LLaVA-OneVision has 6 × 6 tokens of a frame
    side = 6 if family == "llava_onevision" and version != "v4" else 3
    with vlmcompress.compress(model, "quota", keep=budget, scores=(P,), version=version, cap=patches) as handle:
        model.generate(**inputs, **GREEDY)
        image = kept(handle)
        tokens = image.kept[~image.is_newline[image.kept]]
        per_frame = torch.bincount(tokens // patches, minlength=4).tolist()
        method = QuoTA(keep=budget, cap=patches)
        counts = method.counts(torch.tensor(P), budget, [side**2] * 4)
    assert sum(counts) == budget and counts[0] == patches and counts[3] == 0
    if version in ("v3", "v4"):
        assert per_frame == counts
    else:
        assert per_frame == [h * w for h, w in method.grids(counts, (side, side))]
    assert int(image.is_newline[image.kept].sum()) == (family == "llava_onevision")


def fed_to(model, inputs, **options):
    """What the language model of ``model`` gets, [S, C], and the record of the pass."""
    fed = []
    layer = model.model.language_model.layers[0]
    watch = layer.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with vlmcompress.compress(model, "quota", **options) as handle:
        model(**inputs)
    watch.remove()
    return fed[0][0], handle.last


@pytest.mark.parametrize("cap", ["grid", None])
@torch.no_grad()
def test_what_the_language_model_is_fed(cap):
    """Every frame is resized from what the projector made of it; one may take places of its neighbours."""
    model = tiny_onevision()
    inputs = prompts_video(model, [[5, CLIP, 4]])
    outputs = []
    watch = model.model.multi_modal_projector.register_forward_hook(lambda m, args, output: outputs.append(output))
    model(**inputs)
    watch.remove()
    (whole,) = outputs
    for p in (P, P[::-1], (0.01, 0.01, 0.99, 0.01)):
        found, record = fed_to(model, inputs, keep=34, scores=(p,), cap=cap)
        method = QuoTA(keep=34, cap=cap)
        counts = method.counts(torch.tensor(p), 34, [36] * 4)
        grids = method.grids(counts, (6, 6))
        assert sum(counts) == 34 and max(counts) > 9
        rows = [
            resize_bilinear(f[None], h, w)[0] for f, (h, w) in zip(whole.unflatten(1, (6, 6)), grids, strict=True) if h
        ]
        expected = torch.cat([*rows, model.model.image_newline[None]])
        torch.testing.assert_close(found[5:-4], expected, atol=1e-5, rtol=1e-5)
        image = record.samples[0].images[0]
        assert len(image.kept) == len(expected) and (image.kept.diff() > 0).all() and image.kept[-1] == 36
        # every token of a frame is part of one of that frame's own
        end = torch.tensor([h * w for h, w in grids]).cumsum(0)
        for place, sources in enumerate(image.sources[:-1]):
            frame = int((end <= place).sum())
            assert all(int(token) // 9 == frame for token in sources)


@torch.no_grad()
def test_a_frame_past_its_own_grid():
    """Without a cap a frame of LLaVA-NeXT-Video grows beyond the nine tokens that the model itself would feed."""
    model = tiny_next_video()
    inputs = prompts_video(model, [[5, CLIP, 4]])
    p = (0.9, 0.1, 0.1, 0.1)
    _, capped = fed_to(model, inputs, keep=30, scores=(p,), rounding="truncate")
    _, free = fed_to(model, inputs, keep=30, scores=(p,), rounding="truncate", cap=None)
    assert QuoTA(keep=30, rounding="truncate", cap=None).counts(torch.tensor(p), 30, [9] * 4) == [28, 0, 0, 0]
    assert len(capped.samples[0].images[0].kept) == 9
    assert free.samples[0].images[0].kept.equal(torch.arange(25))


def test_places_behind_each_other():
    assert apart(torch.tensor([0, 0, 1, 5]), 9).tolist() == [0, 1, 2, 5]
    assert apart(torch.tensor([3, 8, 8, 8]), 9).tolist() == [3, 6, 7, 8]
    assert apart(torch.tensor([4]), 5).tolist() == [4]


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
        ("cap is 'grid'", {"cap": 0}),
        ("cap is 'grid'", {"cap": "frame"}),
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
