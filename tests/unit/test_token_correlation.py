# SPDX-License-Identifier: Apache-2.0
"""Token-level correlation in batches, on blank and on crowded crops, with budgets, on other families, with bad input."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, prompts, tiny_llava
from models_next import one_row, prompts_next, tiny_next
from models_qwen import prompts_qwen, tiny_qwen
from models_qwen import row_of as qwen_row
from models_tiles import FAMILIES
from models_tiles import prompts as prompts_tiles
from models_video import prompts_video, tiny_onevision

import vlmcompress
from vlmcompress.methods.token_correlation import TokenCorrelation
from vlmcompress.ops.correlation import draw, fill_scores, guarded, merge_dropped, outliers, repetition, sub_images
from vlmcompress.ops.select import largest_remainder

torch.set_num_threads(1)
GREEDY = dict(max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])
SPEC = [[5, "square", 3], [2, "row", 3, "tall", 1], [8, "wide", 4]]
IMAGES = [slice(0, 1), slice(1, 3), slice(3, 4)]
#: in a tiny random tower only loose thresholds leave the draw something to decide
LOOSE = {"tau_sim": 0.6, "tau_num": 0.2}
OPTIONS = [
    LOOSE,
    {**LOOSE, "sampler": "replacement", "key_heads": "mean"},
    {**LOOSE, "aggregate": "merge", "sampler": "topk"},
    {**LOOSE, "exclude_redundant": True, "deep": 1, "low": 0},
    {"keep": 80, "aggregate": "merge"},
    {"keep": 0.6},
]
names = ["-".join(f"{k}={v}" for k, v in o.items() if k not in LOOSE) or "default" for o in OPTIONS]


@pytest.fixture(scope="module")
def model():
    return tiny_next(eos_token_id=None)


def blank_parts(inputs):
    """Half of every crop of these prompts is one colour."""
    inputs["pixel_values"][..., : inputs["pixel_values"].shape[-1] // 2] = 0.3
    return inputs


# in the model ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", OPTIONS, ids=names)
@torch.no_grad()
def test_batched_equals_single(model, options):
    left, right = (blank_parts(prompts_next(model, SPEC, side=side)) for side in ("left", "right"))
    with vlmcompress.compress(model, "token-correlation", **options) as handle:
        new = model.generate(**left, **GREEDY)[:, left["input_ids"].shape[1] :]
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp_min(0) for x in (left, right)]
        batch_left = model(**left, position_ids=positions[0]).logits
        records = [[i.kept for i in s.images] for s in handle.last.samples]
        assert any(len(i.kept) < i.n_original for s in handle.last.samples for i in s.images)
        batch_right = model(**right, position_ids=positions[1]).logits
        assert handle.report().compressor_flops > 0
        for row, images in enumerate(IMAGES):
            alone = one_row(left, row, images)
            n = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for kept, image in zip(records[row], handle.last.samples[0].images, strict=True):
                assert kept.equal(image.kept)
            torch.testing.assert_close(batch_left[row, -n:], logits, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(batch_right[row, :n], logits, atol=2e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, n:].equal(new[row])


@torch.no_grad()
def test_a_blank_crop_keeps_next_to_nothing_and_the_thumbnail_all(model):
    inputs = prompts_next(model, [[3, "square", 2]])
    inputs["pixel_values"][0, 2] = 0.3  # the second crop
    position = model.model.vision_tower.embeddings.position_embedding.weight
    before = position.clone()
    position[1:] = position[1]  # blank paper looks the same everywhere
    try:
        with vlmcompress.compress(model, "token-correlation", tau_num=3, ignore_flat=True) as handle:
            model(**inputs)
    finally:
        position.copy_(before)
    image = handle.last.samples[0].images[0]
    kept = torch.bincount(image.views[image.kept] + 1, minlength=6).tolist()
    assert kept[:2] == [12, 36]  # newlines, thumbnail
    assert kept[3] == 1
    assert min(kept[2], *kept[4:]) == 36


@torch.no_grad()
def test_nothing_repeats_is_bit_identical(model):
    inputs = prompts_next(model, SPEC)
    before, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    for options in ({"tau_num": 1.0}, {"tau_num": 36, "aggregate": "merge"}, {"keep": 1.0}, {"keep": 10_000}):
        with vlmcompress.compress(model, "token-correlation", **options):
            assert model(**inputs).logits.equal(before)
            assert model.generate(**inputs, **GREEDY).equal(answer)


@torch.no_grad()
def test_budgets_are_exact_and_follow_density(model):
    inputs = blank_parts(prompts_next(model, SPEC))
    for keep in (70, 71, 100, 150, 0.5, 0.77):
        with vlmcompress.compress(model, "token-correlation", keep=keep, **LOOSE) as handle:
            model(**inputs)
            for image in (i for s in handle.last.samples for i in s.images):
                wanted = min(keep, image.n_original) if isinstance(keep, int) else round(keep * image.n_original)
                assert len(image.kept) == wanted
                assert (image.views[image.kept] < 0).sum() == (image.views < 0).sum()
    with vlmcompress.compress(model, "token-correlation", keep=40), pytest.raises(ValueError, match="no room"):
        model(**inputs)


@torch.no_grad()
def test_merged_rows_reach_the_projector(model):
    inputs = blank_parts(prompts_next(model, [[3, "tall", 2]]))
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    with vlmcompress.compress(model, "token-correlation", aggregate="merge", **LOOSE) as handle:
        model(**inputs)
    model(**inputs)
    hook.remove()
    merged, rows = seen
    layout, image = handle.last.layout, handle.last.samples[0].images[0]
    owner = handle.last.selection.owner[0]
    assert owner.min() >= 0  # every token went somewhere
    assert owner[image.kept].tolist() == list(range(len(image.kept)))
    sizes = torch.bincount(owner)
    views = layout.view[0]
    assert (views[image.kept][owner] == views).all()  # and never to another crop
    stock = layout.of_views(rows)[0][image.kept]
    change = (merged[0] - stock).abs().amax(-1)
    patch = layout.cell[0][image.kept] >= 0
    assert sizes.max() > 1
    assert (change[patch & (sizes == 1)] == 0).all()
    assert (change[patch & (sizes > 1)] > 0).all()


@torch.no_grad()
def test_half_precision_and_seeds(model):
    inputs = blank_parts(prompts_next(model, [[3, "square", 2]]))

    def kept(**options):
        with vlmcompress.compress(model, "token-correlation", **LOOSE, **options) as handle:
            model(**inputs)
        return handle.last.samples[0].images[0].kept

    assert kept().equal(kept())
    assert not kept().equal(kept(seed=1))
    assert kept(sampler="topk").equal(kept(sampler="topk", seed=1))
    half = tiny_next(eos_token_id=None).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vlmcompress.compress(half, "token-correlation", **LOOSE) as handle:
        assert model.config.model_type and half(**inputs).logits.isfinite().all()
    assert len(handle.last.samples[0].images[0].kept) < handle.last.samples[0].images[0].n_original


# other families -------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_single_view_is_a_crop():
    model = tiny_llava()
    inputs = blank_parts(prompts([[4, "image", 3], [2, "image", 5]], 36))
    with vlmcompress.compress(model, "token-correlation", keep=7) as handle:
        model(**inputs)
    assert [len(s.images[0].kept) for s in handle.last.samples] == [7, 7]


@pytest.mark.parametrize("variant", ["received", "cosine"])
@torch.no_grad()
def test_towers_without_cls(variant):
    model = tiny_onevision()
    spec = [[3, (24, 24), 2]]
    inputs = prompts_video(model, spec)
    with vlmcompress.compress(model, "token-correlation", without_cls=variant, tau_sim=0.3, tau_num=0.05) as handle:
        model(**inputs)
    image = handle.last.samples[0].images[0]
    assert 0 < len(image.kept) < image.n_original


@pytest.mark.parametrize("name", ["internvl", "internvl-qk-norm", "smolvlm"])
@pytest.mark.parametrize("aggregate", ["union", "merge"])
@torch.no_grad()
def test_joined_patches(name, aggregate):
    family = FAMILIES[name]
    model = family.build()
    inputs = prompts_tiles(family, model, [[3, (2, 2), 2], [4, (0, 0), 3]])
    options = {"tau_sim": 0.0, "tau_num": 0.1, "aggregate": aggregate, "sampler": "topk"}
    with vlmcompress.compress(model, "token-correlation", **options) as handle:
        model(**inputs)
    tiled, single = (s.images[0] for s in handle.last.samples)
    assert (tiled.views[tiled.kept] == tiled.views.max()).sum() == family.tokens  # the thumbnail is the last view
    assert len(tiled.kept) < tiled.n_original
    assert len(single.kept) < single.n_original


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_native_resolution_in_virtual_sub_images(family):
    model = tiny_qwen(family=family)
    spec = [[3, (6, 8), 2], [2, (4, 4), 3]]
    inputs = prompts_qwen(spec, family=family)
    options = {"tau_sim": 0.0, "tau_num": 0.2, "side": 2, "low": 0}
    with vlmcompress.compress(model, "token-correlation", **options) as handle:
        model(**inputs)
        kept = [s.images[0].kept for s in handle.last.samples]
        assert any(len(k) < s.images[0].n_original for k, s in zip(kept, handle.last.samples, strict=True))
        image = handle.last.samples[0].images[0]
        rows, cols = (length // 2 for length in (image.rows, image.cols))
        # every block of at most two by two tokens keeps one at least
        blocks = rows * 100 + cols
        assert set(blocks[kept[0]].tolist()) == set(blocks.tolist())
        for row in range(2):
            model(**qwen_row(inputs, row))
            assert handle.last.samples[0].images[0].kept.equal(kept[row])


# the parts ------------------------------------------------------------------------------------------------------
def test_sub_images_of_labels():
    index, valid = sub_images(torch.tensor([2, -1, 0, 2, 2, -1, 0]))
    assert valid.tolist() == [[True, True, False], [True, True, True]]
    assert index[valid].tolist() == [2, 6, 0, 3, 4]
    assert sub_images(torch.tensor([-1, -1]))[0].shape[0] == 0


def test_repetition_stays_within_a_sub_image_and_skips_padding():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [1.0, 0.0]])
    keys = torch.stack([x, x])
    valid = torch.tensor([[True] * 4, [True, True, True, False]])
    for most in (1, 2**24):
        count, redundant = repetition(keys, valid, 0.9, 1, most)
        assert count.tolist() == [[2, 2, 0, 2], [1, 1, 0, 0]]
        assert redundant.tolist() == [[True, True, False, True], [False] * 4]
    assert repetition(keys, valid, 0.9, 0.49)[1].tolist() == [[True, True, False, True], [False] * 4]  # 1 and 1 others
    assert repetition(keys, valid, 0.9, 0.3)[1].tolist() == [[True, True, False, True], [True, True, False, False]]
    assert not repetition(torch.zeros(1, 3, 2), torch.ones(1, 3).bool(), 0.0, 0)[0].any()  # no direction, no likeness


def test_outliers_of_flat_attention():
    valid = torch.ones(1, 8, dtype=torch.bool)
    flat = torch.full((1, 8), 0.1)
    flat[0, 3] += 1e-7
    assert outliers(flat, valid)[0].nonzero().tolist() == [[3]]
    assert not outliers(flat, valid, ignore_flat=True).any()
    valid[0, 3] = False
    assert not outliers(flat, valid).any()


def test_draws():
    attention = torch.tensor([[0.0, 0.4, 0.4, 0.2, 9.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    take = torch.tensor([2])
    assert draw(attention, take, valid, None, "topk").tolist() == [[False, True, True, False, False]]
    even = torch.full((1, 5), 0.5)
    assert draw(attention, take, valid, even).tolist() == [[False, True, True, False, False]]
    assert draw(attention, torch.tensor([4]), valid, even).equal(valid)
    twice = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]])
    assert draw(attention, take, valid, twice, "replacement").tolist() == [[False, False, True, False, False]]
    for sampler in ("gumbel", "replacement"):
        assert not draw(attention, torch.tensor([0]), valid, even, sampler).any()
    # the law: first draws in proportion to attention
    noise = torch.rand(4000, 5, generator=torch.Generator().manual_seed(0))
    rows = [x.expand(4000, -1) for x in (attention, valid)]
    for sampler in ("gumbel", "replacement"):
        share = draw(rows[0], torch.ones(4000, dtype=torch.long), rows[1], noise, sampler).float().mean(0)
        torch.testing.assert_close(share, torch.tensor([0.0, 0.4, 0.4, 0.2, 0.0]), atol=0.03, rtol=0)


def test_guard_fill_and_split():
    low = torch.tensor([[0.2, 0.5, 0.5, 0.1]])
    valid = torch.ones(1, 4, dtype=torch.bool)
    nothing = torch.zeros_like(valid)
    assert guarded(nothing, low, valid).nonzero().tolist() == [[0, 1]]
    assert guarded(nothing, low, valid, 9).all()
    one = torch.tensor([[False, False, False, True]])
    assert guarded(one, low, valid).equal(one)
    assert guarded(one, low, valid, 2).tolist() == [[False, True, False, True]]
    deep = torch.tensor([[0.3, 0.0, 0.4, 0.3]])
    order = fill_scores(deep > 0.2, deep, low, valid).argsort(descending=True, stable=True)
    assert order.tolist() == [[2, 0, 3, 1]]
    # 4.2, 2.1 and 0.7 tokens; what is over goes to the largest remainder, then to the lower index
    assert largest_remainder([0.6, 0.3, 0.1], 7, [9, 9, 9]) == [4, 2, 1]
    assert largest_remainder([1.0, 1.0, 1.0], 5, [9, 9, 9]) == [2, 2, 1]
    assert largest_remainder([0.9, 0.1, 0.0], 12, [6, 9, 9]) == [6, 6, 0]
    assert largest_remainder([0.0, 0.0], 3, [9, 9]) == [2, 1]


def test_merging_by_hand():
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.0, 1.0], [5.0, 5.0]]])
    tokens = torch.tensor([[[1.0], [10.0], [3.0], [20.0], [7.0]]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0, 3.0, 0.0, 1.0]])
    keep = torch.tensor([[True, True, False, False, False]])
    valid = torch.tensor([[True, True, True, True, False]])
    merged, owner = merge_dropped(tokens, keys, weight, keep, valid)
    assert owner.tolist() == [[0, 1, 0, 1, 4]]
    torch.testing.assert_close(merged[0, :2, 0], torch.tensor([2.5, 15.0]))  # no attention at all: a plain mean
    merged[0, 0].sum().backward()
    torch.testing.assert_close(tokens.grad[0, :3, 0], torch.tensor([0.25, 0.0, 0.75]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_sim": 1.0}, "tau_sim is"),
        ({"tau_num": 1.5}, "tau_num is"),
        ({"tau_num": -1}, "tau_num is"),
        ({"tau_num": True}, "tau_num is"),
        ({"iqr_factor": -0.1}, "iqr_factor is"),
        ({"iqr_factor": float("nan")}, "iqr_factor is"),
        ({"low": -1}, "low is at least"),
        ({"min_tokens": 0}, "min_tokens is at least"),
        ({"sampler": "multinomial"}, "sampler is one of"),
        ({"aggregate": "sum"}, "aggregate is one of"),
        ({"key_heads": "max"}, "key_heads is one of"),
        ({"without_cls": "norm"}, "without_cls is one of"),
        ({"keep": 0}, "keep is"),
        ({"low": 3}, "behind vision layer 2"),
        ({"deep": 9}, "behind vision layer 2"),
        ({"temperature": 1}, "no option"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(model, options, message):
    with pytest.raises(ValueError, match=message):
        vlmcompress.compress(model, "token-correlation", **options)
    assert not hasattr(model.config, "vlmcompress")


def test_options_survive_saving():
    method = TokenCorrelation(keep=0.5, sampler="topk", deep=3)
    assert TokenCorrelation(**method.options()) == method
