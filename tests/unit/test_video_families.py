# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision and LLaVA-NeXT-Video: images, videos, both in one prompt, against the stock model and the slow
reference."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, cached
from models_video import BUILDERS, VIDEO, embeddings, features, prompts_video, row_of, tiny_next_video, tiny_onevision
from reference import cleared, entering, real_slots, reference, shown
from torch.utils.flop_counter import FlopCounterMode

import vlmcompress
from vlmcompress.eval.flops import ModelShape, full
from vlmcompress.eval.profiles import compressed, uncompressed

torch.set_num_threads(1)
#: a random model would otherwise answer with placeholders
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, VIDEO])
CLIP = ("video", 3)
PROMPTS = {
    "video": [[5, CLIP, 4]],
    "image and video": [[3, "huge", 2, CLIP, 4]],
    "two images": [[3, "wide", 2, "square", 4]],
    "ragged": [[5, "tall", 3, CLIP, 2], [2, "wide", 1], [2, CLIP, 3, "row", 1], [7]],
}
#: one picture is resized behind the projector, the others are not
MIXED = [[5, "huge", 3, CLIP, 2], [2, "wide", 1], [2, CLIP, 3, "row", 1]]
#: one method or more for every stage (MustDrop's third clears the cache)
METHODS = {
    "vtc-cls": {"keep": 7}, "pool": {"keep": 7}, "flowcut": {"keep": 8}, "fastv": {"keep": 7},
    "transprune": {"keep": 0.4}, "mustdrop": {"gamma": 0.02, "alpha": 0.08, "layers": (1, 2), "merge": False},
}  # fmt: skip
families = pytest.mark.parametrize("family", BUILDERS)


def inside(sample):
    """(kind, patches kept, newlines kept) of every image and video of a prompt."""
    return [
        (image.kind, int((~image.is_newline[image.kept]).sum()), int(image.is_newline[image.kept].sum()))
        for image in sample.images
    ]


@families
@torch.no_grad()
def test_the_layout_is_the_stock_models_own(family):
    model = BUILDERS[family]()
    inputs = prompts_video(model, [[1, "huge", 2], [1, "tall", 2, CLIP], [1, "row", 1, "square", 1, CLIP, 1]])
    images, videos = features(model, inputs)
    adapter = vlmcompress.compress(model, "none").adapter
    seen = []
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(output))
    for stock, door in ((images, adapter.geometry), (videos, adapter.video_geometry)):
        seen.clear()
        layout = door(inputs)
        features(model, inputs if stock is images else {"pixel_values_videos": inputs["pixel_values_videos"]})
        rows = seen[0]
        if layout.pooling is not None and layout.pooling.behind_projector:
            rows = layout.pooling(rows)
        assert layout.n == [len(tokens) for tokens in stock]
        ours, newline = layout.of_views(rows), model.model.image_newline
        for i, tokens in enumerate(stock):
            patch = layout.patch[i, : layout.n[i]]
            torch.testing.assert_close(ours[i, : layout.n[i]][patch], tokens[patch], atol=1e-5, rtol=1e-5)
            assert tokens[~patch].equal(newline.expand(int((~patch).sum()), -1))
            height, width = layout.grid[i]
            assert int(layout.row[i][layout.patch[i]].max()) == height - 1
            assert int(layout.col[i][layout.patch[i]].max()) == width - 1


def test_a_resized_picture_keeps_its_cells_in_the_crop_of_their_centre():
    model = tiny_onevision()
    adapter = vlmcompress.compress(model, "none").adapter
    layout = adapter.geometry({"pixel_values": torch.zeros(1, 10, 3, 24, 24), "image_sizes": torch.tensor([[72, 72]])})
    assert layout.pooling is not None
    assert layout.grid == [(12, 12)]
    crop = layout.patch[0] & (layout.view[0] > 0)
    centre = ((layout.row[0] + 0.5) * 18 / 12 // 6) * 3 + (layout.col[0] + 0.5) * 18 / 12 // 6
    assert (layout.view[0] - 1)[crop].equal(centre.long()[crop])
    weight = layout.pooling.weight[layout.view[0][crop], layout.cell[0][crop]]
    assert torch.allclose(weight.sum(-1), torch.ones(144))


@families
@pytest.mark.parametrize("name", ["none", "random", "grid", "pool", "vtc-cls", "flowcut", "fastv"])
@torch.no_grad()
def test_keeping_everything_changes_nothing(family, name):
    model = BUILDERS[family]()
    inputs = prompts_video(model, MIXED)
    stock = model(**inputs).logits
    with vlmcompress.compress(model, name, **({} if name == "none" else {"keep": 1.0})) as handle:
        assert model(**inputs).logits.equal(stock)
        assert [i.kind for s in handle.last.samples for i in s.images] == ["image", "video", "image", "video", "image"]
    assert model(**inputs).logits.equal(stock)


@families
@torch.no_grad()
def test_the_budget_counts_per_video_and_newlines_come_on_top(family):
    model = BUILDERS[family]()
    inputs = prompts_video(model, [[3, CLIP, 2, CLIP, 1], [2, CLIP, 4]])
    newline = int(family == "llava_onevision")
    for name in ("vtc-cls", "grid", "random"):
        for keep, wanted in ((1, 1), (7, 7), (0.5, round(0.5 * 27 + 1e-9)), (1000, 27)):
            with vlmcompress.compress(model, name, keep=keep) as handle:
                model(**inputs)
                assert [inside(s) for s in handle.last.samples] == [
                    [("video", wanted, newline)] * 2,
                    [("video", wanted, newline)],
                ]
    with vlmcompress.compress(model, "vtc-cls", keep=7, newlines=False) as handle:
        model(**inputs)
        assert inside(handle.last.samples[1]) == [("video", 7, 0)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@families
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_equals_reference(family, name, prompt, attention):
    model = BUILDERS[family](attention)
    inputs = prompts_video(model, PROMPTS[prompt])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    stock = embeddings(model, inputs)
    steps = torch.randint(4, 96, (len(ids), 3), generator=torch.Generator().manual_seed(3))
    later_mask = torch.nn.functional.pad(mask, (0, 3), value=1)
    with vlmcompress.compress(model, name, **METHODS[name]) as handle:
        output = None

        def prefill():
            nonlocal output
            output = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0), use_cache=True)

        entered = entering(model, prefill)
        ledger = handle.last
        positions = later_mask.cumsum(1)[:, -3:] - 1
        behind = model(input_ids=steps, attention_mask=later_mask, position_ids=positions, **cached(output)).logits
    first = ledger.frames[0]
    if name in ("fastv", "transprune", "mustdrop"):
        assert entered.equal(stock)
    elif name == "vtc-cls" or (name, prompt) == ("flowcut", "video"):
        picked = stock.gather(1, first.index[..., None].expand_as(entered))
        torch.testing.assert_close(entered[real_slots(first)], picked[real_slots(first)], atol=1e-5, rtol=1e-5)
    policy = handle._wiring._policies[id(handle.method.methods[0])]
    masks = shown(ledger)
    later = cleared(masks, 1) if name == "mustdrop" else masks
    expected = reference(
        model, entered, masks, real_slots(first), ledger.positions, policy=policy, later=steps, later_masks=later
    )
    prompt_logits = output.logits.gather(1, first.index[..., None].expand(-1, -1, output.logits.shape[-1]))
    here = masks[-1]
    torch.testing.assert_close(prompt_logits[here], expected[:, :-3][here], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(behind, expected[:, -3:], atol=1e-4, rtol=1e-4)


@families
@pytest.mark.parametrize("name", ["vtc-cls", "flowcut", "fastv", "mustdrop"])
@torch.no_grad()
def test_a_ragged_batch_is_its_rows_alone(family, name):
    model = BUILDERS[family]()
    spec = PROMPTS["ragged"][:3] if name == "flowcut" else MIXED
    inputs = prompts_video(model, spec)
    alone = [row_of(inputs, spec, row) for row in range(len(spec))]
    with vlmcompress.compress(model, name, **METHODS[name]) as handle:
        together = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        samples = handle.last.samples
        for row, inputs_row in enumerate(alone):
            assert model.generate(**inputs_row, **GREEDY)[0, -4:].equal(together[row])
            for ours, its in zip(samples[row].images, handle.last.samples[0].images, strict=True):
                assert ours.kept.equal(its.kept)
                assert ours.kept_at(3).equal(its.kept_at(3))


@families
@torch.no_grad()
def test_beams_share_their_video(family):
    model = BUILDERS[family]()
    inputs = prompts_video(model, [[3, "huge", 2, CLIP, 4]])
    with vlmcompress.compress(model, "vtc-cls", keep=7) as handle:
        expected = model.generate(**inputs, num_beams=3, **GREEDY)
        ids = handle.last
        assert [inside(s) for s in ids.samples] == [inside(ids.samples[0])] * len(ids.samples)
        twice = {k: torch.cat([v, v]) for k, v in inputs.items()}
        assert model.generate(**twice, num_beams=3, **GREEDY).equal(expected.repeat(2, 1))


@families
@torch.no_grad()
def test_a_second_turn_brings_a_video(family):
    """Two turns on one cache equal one prompt that has both, when everything before the second one is visible alike."""
    model = BUILDERS[family]()
    whole = prompts_video(model, [[3, "wide", 4, CLIP, 2]])
    ids, videos = whole["input_ids"], whole.pop("pixel_values_videos")
    begin = int((ids[0] == VIDEO).nonzero()[0]) - 2
    with vlmcompress.compress(model, "vtc-cls", keep=7) as handle:
        expected = model(**whole, pixel_values_videos=videos).logits[:, -2:]
        both = inside(handle.last.samples[0])
        first = model(**{**whole, "input_ids": ids[:, :begin], "attention_mask": whole["attention_mask"][:, :begin]})
        second = model(
            input_ids=ids[:, begin:],
            attention_mask=whole["attention_mask"],
            **cached(first),
            pixel_values_videos=videos,
        )
        assert inside(handle.last.samples[0]) == both[1:]
    torch.testing.assert_close(second.logits[:, -2:], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_maximum_or_a_convolution_pools_too():
    for mode in ("max", "conv"):
        model = tiny_next_video(mode=mode)
        inputs = prompts_video(model, [[3, CLIP, 2]])
        stock = model(**inputs).logits
        with vlmcompress.compress(model, "vtc-cls", keep=1.0):
            assert model(**inputs).logits.equal(stock)
        with vlmcompress.compress(model, "vtc-cls", keep=5) as handle:
            assert model(**inputs).logits[:, -1].isfinite().all()
            assert inside(handle.last.samples[0]) == [("video", 5, 0)]


@families
@pytest.mark.parametrize(("name", "options"), [("tome", {"keep": 0.5}), ("resize", {"keep": 0.5})])
@torch.no_grad()
def test_cuts_in_the_tower_are_refused_where_patches_are_pooled(family, name, options):
    model = BUILDERS[family]()
    still, clip = prompts_video(model, [[3, "wide", 2]]), prompts_video(model, [[3, CLIP, 2]])
    stock = model(**clip).logits
    with vlmcompress.compress(model, name, **options) as handle:
        assert model(**still).logits[:, -1].isfinite().all()
        assert len(handle.last.samples[0].images[0].kept) < handle.last.samples[0].images[0].n_original
        with pytest.raises(ValueError, match=f"'{name}' drops patches inside the vision tower"):
            model(**clip)
    assert model(**clip).logits.equal(stock)


@torch.no_grad()
def test_flowcut_refuses_a_batch_of_pictures_that_it_treats_differently():
    model = tiny_onevision()
    mixed, alike = prompts_video(model, [[2, "huge", 1], [2, "wide", 1]]), prompts_video(model, [[2, "huge", 1]] * 2)
    with vlmcompress.compress(model, "flowcut", keep=8) as handle:
        with pytest.raises(ValueError, match="run them one by one"):
            model(**mixed)
        model(**alike)
        assert [len(i.kept_at(3)) for s in handle.last.samples for i in s.images] == [8, 8]


def test_a_tower_that_loses_its_first_patch_is_refused():
    model = tiny_onevision()
    model.config.vision_feature_select_strategy = "default"
    with pytest.raises(ValueError, match="cuts off its first patch"):
        vlmcompress.compress(model, "vtc-cls")


@families
@torch.no_grad()
def test_flops_agree_with_torch(family):
    model = BUILDERS[family]("eager")  # torch does not count the CPU's fused attention
    inputs = prompts_video(model, [[3, "huge", 2, CLIP, 4]])
    shape = ModelShape.from_config(model.config)
    with FlopCounterMode(display=False) as stock:
        model(**inputs, logits_to_keep=1)
    for name, options in (("none", {}), ("vtc-cls", {"keep": 7})):
        with vlmcompress.compress(model, name, **options) as handle, FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        (profile,) = compressed(shape, handle.last)
        method = profile.compressor
        assert full(shape, profile) - method == pytest.approx(counter.get_total_flops() - method, rel=0.03)
        assert "1 image(s), 1 video(s)," in str(handle.report())
        assert full(shape, uncompressed(shape, handle.last)[0]) == pytest.approx(stock.get_total_flops(), rel=0.01)


@families
@torch.no_grad()
def test_globalcom2_gives_more_to_frames_that_stand_out(family):
    """Against the formulas written out per video: weights over frames, ranks inside them."""
    model = BUILDERS[family]()
    inputs = prompts_video(model, [[2, CLIP, 3, "wide", 1], [1, CLIP, 2]])
    stock = model(**inputs).logits
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    features(model, {"pixel_values_videos": inputs["pixel_values_videos"]})
    hook.remove()
    with vlmcompress.compress(model, "none") as handle:
        layout = handle.adapter.video_geometry(inputs)
    rows = layout.pooling(seen[0][1]) if layout.pooling.behind_projector else seen[0][0]
    newline = int(layout.closing_newline)
    with vlmcompress.compress(model, "globalcom2", keep=0.4, tau=0.5) as handle:
        model(**inputs)
        for video, sample in enumerate(handle.last.samples):
            (image,) = (image for image in sample.images if image.kind == "video")
            x = rows[3 * video : 3 * video + 3].double()
            cos = torch.nn.functional.cosine_similarity
            whole, own = -cos(x, x.mean((0, 1), keepdim=True), dim=-1), -cos(x, x.mean(1, keepdim=True), dim=-1)
            sigma = (whole.sum(1) / 0.5).softmax(0)
            kept = []
            for frame in range(3):
                count = int(9 * min(1.0, 0.4 * float(1 + sigma[frame] - sigma.mean())))
                best = (whole + own)[frame].topk(count).indices.sort().values
                kept += (best + 9 * frame).tolist()
            assert image.kept.tolist() == kept + [27] * newline
    with vlmcompress.compress(model, "globalcom2", keep=10) as handle:
        model(**inputs)
        assert [len(i.kept) for s in handle.last.samples for i in s.images if i.kind == "video"] == [10, 10]
    with vlmcompress.compress(model, "globalcom2", keep=0.01) as handle:
        model(**inputs)
        assert inside(handle.last.samples[1]) == [("video", 1, newline)]
    with vlmcompress.compress(model, "globalcom2", keep=1.0):
        assert model(**inputs).logits.equal(stock)
    with vlmcompress.compress(model, "globalcom2", layout="official"), pytest.raises(ValueError, match="no videos"):
        model(**inputs)
