# SPDX-License-Identifier: Apache-2.0
"""GlobalCom² in batches, with exact budgets, on untiled models, with bad input."""

from __future__ import annotations

import time

import pytest
import torch
from models import BEAMS, IMAGE, prompts, tiny_llava
from models_next import one_row, prompts_next, tiny_next
from models_qwen import prompts_qwen, tiny_qwen

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.baselines.fastv import FastV
from vlmcompress.baselines.keep_last import KeepLast
from vlmcompress.methods.globalcom2 import GlobalCom2
from vlmcompress.methods.transprune import TransPrune
from vlmcompress.views import EntryTokens

torch.set_num_threads(1)
#: a random model would otherwise answer with image placeholders
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
SPEC = [[5, "square", 3], [2, "row", 3, "tall", 1], [8, "wide", 4]]
IMAGES = [slice(0, 1), slice(1, 3), slice(3, 4)]
OPTIONS = [
    {"keep": 0.25},
    {"keep": 0.3, "newlines": "occupied"},
    {"keep": 30},
    {"keep": 17, "newlines": "occupied"},
    {"keep": 0.5, "exact_budget": True, "alpha": 0.3},
    {"keep": 0.2, "layout": "official"},
    {"keep": 40, "layout": "official"},
]
names = ["-".join(map(str, o.values())) for o in OPTIONS]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_next(attention=request.param, eos_token_id=None)


@pytest.mark.parametrize("options", OPTIONS, ids=names)
@torch.no_grad()
def test_batched_equals_single(model, options):
    left, right = prompts_next(model, SPEC), prompts_next(model, SPEC, side="right")
    with vlmcompress.compress(model, "globalcom2", **options) as handle:
        new = model.generate(**left, **GREEDY)[:, left["input_ids"].shape[1] :]
        beams = model.generate(**left, num_beams=BEAMS, **GREEDY)[:, left["input_ids"].shape[1] :]
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp_min(0) for x in (left, right)]
        batch_left = model(**left, position_ids=positions[0]).logits
        records = [[(i.kept, i.scores()) for i in s.images] for s in handle.last.samples]
        batch_right = model(**right, position_ids=positions[1]).logits
        assert handle.report().compressor_flops > 0
        for row, images in enumerate(IMAGES):
            alone = one_row(left, row, images)
            n = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for (kept, scores), image in zip(records[row], handle.last.samples[0].images, strict=True):
                assert kept.equal(image.kept)
                torch.testing.assert_close(scores, image.scores(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(batch_left[row, -n:], logits, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(batch_right[row, :n], logits, atol=2e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, n:].equal(new[row])
            assert model.generate(**alone, num_beams=BEAMS, **GREEDY)[0, n:].equal(beams[row])


@pytest.mark.parametrize("options", OPTIONS, ids=names)
@torch.no_grad()
def test_the_language_model_gets_the_selected_embeddings(model, options):
    """The kept tokens of the stock features, in feeding order, are what the decoder reads."""
    inputs = prompts_next(model, [[3, "tall", 2]])
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output[0]
    fed = {}
    with vlmcompress.compress(model, "globalcom2", **options) as handle:
        hook = model.model.language_model.register_forward_pre_hook(lambda m, a, k: fed.update(k), with_kwargs=True)
        model(**inputs)
        hook.remove()
    selection = handle.last.selection
    order = (selection.keep if selection.copies is None else selection.copies)[0, : selection.counts[0]]
    torch.testing.assert_close(fed["inputs_embeds"][0, 3:-2], stock[order])
    assert handle.last.samples[0].images[0].kept.equal(order.sort().values)


@pytest.mark.parametrize("keep", [1.0, 100_000])
@pytest.mark.parametrize("newlines", ["all", "occupied"])
@torch.no_grad()
def test_keeping_all_is_bit_identical(model, keep, newlines):
    inputs = prompts_next(model, SPEC)
    before, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    with vlmcompress.compress(model, "globalcom2", keep=keep, newlines=newlines):
        assert model(**inputs).logits.equal(before)
        assert model.generate(**inputs, **GREEDY).equal(answer)


@pytest.mark.parametrize("newlines", ["all", "occupied"])
@torch.no_grad()
def test_exact_budgets_count_newlines(newlines):
    model = tiny_next()
    inputs = prompts_next(model, SPEC)
    for keep in (13, 14, 29, 60, 100, 143, 144, 145, 191, 192, 0.2, 0.71):
        with vlmcompress.compress(model, "globalcom2", keep=keep, exact_budget=True, newlines=newlines) as handle:
            model(**inputs)
            for image in (i for s in handle.last.samples for i in s.images):
                wanted = min(keep, image.n_original) if isinstance(keep, int) else round(keep * image.n_original)
                assert len(image.kept) == wanted
                rows = set(image.rows[image.kept[image.is_newline[image.kept]]].tolist())
                assert newlines == "occupied" or len(rows) == image.grid[0]


@torch.no_grad()
def test_richer_crops_keep_more():
    model = tiny_next(vision={"initializer_factor": 1.0})
    inputs = prompts_next(model, [[2, "square", 2]])
    counts = {}
    for tau in (1e-3, 1e6):
        with vlmcompress.compress(model, "globalcom2", keep=0.25, tau=tau) as handle:
            model(**inputs)
            image = handle.last.samples[0].images[0]
            counts[tau] = torch.bincount(image.views[image.kept] + 1)[2:].tolist()
    assert set(counts[1e6]) <= {8, 9}
    assert sorted(counts[1e-3]) == [6, 6, 6, 15]


@pytest.mark.parametrize(("keep", "left"), [(0.25, 9), (0.01, 1), (7, 7), (1.0, 36), (50, 36)])
@torch.no_grad()
def test_one_view_is_its_own_thumbnail(keep, left):
    model = tiny_llava()
    inputs = prompts([[4, "image", 3], [2, "image", 5]], 36)
    layer = model.model.vision_tower.encoder.layers[-1]
    hidden = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    x = layer.layer_norm1(hidden)
    q, k = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
    logits = ((q[:, :, :1] * 8**-0.5) @ k.mT).mean(1)[:, 0, 1:]
    with vlmcompress.compress(model, "globalcom2", keep=keep) as handle:
        model(**inputs)
        for row, sample in enumerate(handle.last.samples):
            image = sample.images[0]
            assert image.kept.equal(logits[row].topk(left).indices.sort().values)
            torch.testing.assert_close(image.scores(), logits[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_tower_without_cls_ranks_by_the_mean_patch():
    model = tiny_qwen()
    inputs = prompts_qwen([[3, (4, 6), 2], [2, (3, 4), 5]])
    with vlmcompress.compress(model, "globalcom2", keep=0.25) as handle:
        model(**inputs)
        kept = [s.images[0].kept for s in handle.last.samples]
    hidden = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).last_hidden_state
    for mine, patches in zip(kept, hidden.split([96, 48]), strict=True):
        cosine = torch.nn.functional.cosine_similarity(patches, patches.mean(0), dim=-1)
        best = (-cosine).view(-1, 4).mean(1).topk(len(patches) // 16).indices
        assert mine.equal(best.sort().values)


@torch.no_grad()
def test_tower_without_cls_can_compare_tokens():
    model = tiny_qwen()
    inputs = prompts_qwen([[3, (4, 6), 2], [2, (3, 4), 5]])
    features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    with vlmcompress.compress(model, "globalcom2", keep=0.25, cosine="tokens") as handle:
        model(**inputs)
        for sample, tokens in zip(handle.last.samples, features, strict=True):
            cosine = torch.nn.functional.cosine_similarity(tokens, tokens.mean(0), dim=-1)
            assert sample.images[0].kept.equal((-cosine).topk(len(tokens) // 4).indices.sort().values)
            torch.testing.assert_close(sample.images[0].scores()[: len(tokens)], -cosine, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["hf", "official"])
@pytest.mark.parametrize(
    "after", [FastV(keep=10), TransPrune(), FastV(keep=10) + KeepLast(budget=40)], ids=["fastv", "transprune", "two"]
)
@torch.no_grad()
def test_composition(model, after, layout):
    inputs = prompts_next(model, SPEC)
    with vlmcompress.compress(model, GlobalCom2(keep=0.4, layout=layout) + after) as handle:
        new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        batch = [[i.kept_at(3) for i in s.images] for s in handle.last.samples]
        tokens = handle.last.layer_tokens
        assert tokens[0] > tokens[3]
        for row, images in enumerate(IMAGES):
            alone = one_row(inputs, row, images)
            assert model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :].equal(new[row])
            for kept, image in zip(batch[row], handle.last.samples[0].images, strict=True):
                assert kept.equal(image.kept_at(3))


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_training(layout):
    model = tiny_next().train()
    inputs = prompts_next(model, SPEC)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] <= IMAGE, -100)
    with vlmcompress.compress(model, "globalcom2", keep=0.3, layout=layout):
        model(**inputs, labels=labels).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.model.image_newline.grad.abs().sum() > 0


@torch.no_grad()
def test_bf16_models_are_scored_in_fp32():
    model = tiny_next().bfloat16()
    inputs = prompts_next(model, SPEC)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vlmcompress.compress(model, "globalcom2", keep=40) as handle:
        model(**inputs)
    for image in (i for s in handle.last.samples for i in s.images):
        assert len(image.kept) == 40
        scores = image.scores()[~image.is_newline]
        assert len(scores.unique()) > 0.95 * len(scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep is a number"),
        ({"tau": 0}, "tau is a temperature"),
        ({"alpha": 1.5}, "alpha is a weight"),
        ({"layout": "llava"}, "layout is 'hf' or 'official'"),
        ({"cosine": "pixels"}, "cosine is 'patches' or 'tokens'"),
        ({"newlines": "none"}, "newlines is 'all' or 'occupied'"),
        ({"layout": "official", "newlines": "occupied"}, "newline after every row"),
    ],
)
def test_bad_options_change_nothing(options, message):
    model = tiny_next()
    with pytest.raises(ValueError, match=message):
        vlmcompress.compress(model, "globalcom2", **options)
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_budgets_that_cannot_be_met():
    model = tiny_next()
    inputs = prompts_next(model, [[2, "square", 2]])
    with vlmcompress.compress(model, "globalcom2", keep=12), pytest.raises(ValueError, match="no room for a patch"):
        model(**inputs)
    wide = prompts_next(model, [[2, "row", 2]])
    with vlmcompress.compress(model, "globalcom2", keep=1.0, tau=1e9, layout="official") as handle:
        model(**wide)
        assert len(handle.last.samples[0].images[0].kept) <= 36 + 6 * 19


@torch.no_grad()
def test_allocation_and_selection_take_little_time():
    """One 2 × 2 image at true size: 24 × 24 cells, five views. The bound is loose; the measured time is near 1 ms."""
    model = tiny_next(vision={"image_size": 24, "patch_size": 1})
    layout = adapter_for(model).geometry(
        {"pixel_values": torch.zeros(1, 5, 3, 24, 24), "image_sizes": torch.tensor([[48, 48]])}
    )
    assert layout.n == [2928]
    tokens, row = EntryTokens(layout, torch.zeros(5, 576, 4), None), torch.randn(5, 576)
    method, times = GlobalCom2(keep=0.25), []
    for _ in range(8):
        start = time.perf_counter()
        selection = method.entry(tokens, {"row": row.clone()})
        times.append(time.perf_counter() - start)
    assert 700 <= selection.counts[0] <= 768
    assert min(times) < 0.03
