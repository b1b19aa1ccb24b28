# SPDX-License-Identifier: Apache-2.0
"""TransPrune and MustDrop: schedules, published FLOPs, budgets, calibration, other backbones, composition, bad input."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import IMAGE, PAD, TEXT, prompts, tiny_llava
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

import vlmcompress
from vlmcompress.calibrate import average_tokens, calibrate
from vlmcompress.eval.flops import ModelShape, Profile, Stack, macs
from vlmcompress.methods.mustdrop import MustDrop
from vlmcompress.methods.output_cache import OutputCache
from vlmcompress.methods.transprune import TransPrune
from vlmcompress.methods.vtc_cls import VtcCls

N, DEPTH = 36, 6
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
STAGES = {"layers": (1, 2, 4), "fractions": (0.8, 0.5, 0.2)}
FILTERS = {"layers": (0, 2, 3), "gamma": 0.03, "alpha": 0.06}
VICUNA = ModelShape(
    Stack(32, 4096, 11008, 32, 32, 128, True), 32064, Stack(24, 1024, 4096, 16, 16, 64, False), 577, 1, 588, ()
)


@pytest.fixture(scope="module")
def model():
    return tiny_llava(eos_token_id=None, num_hidden_layers=DEPTH)


@pytest.fixture(scope="module")
def inputs():
    return prompts([[5, "image", 7], [2, "image", 3, "image", 2]], N)


def tera(per_layer):
    return macs(VICUNA, Profile(tuple(per_layer))) / 1e12


# published numbers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "n", "published"), [("high", 576, 1.56), ("high", 2880, 8.33), ("low", 576, 1.19), ("low", 2880, 6.41)]
)
def test_transprune_published_flops(preset, n, published):
    schedule = TransPrune(preset=preset).schedule(32)
    assert schedule.layers == (7, 9, 12)
    assert schedule.accumulate == (7, 8, 9, 10, 11, 12)
    assert tera(schedule.per_layer(n)) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("layers", "published"), [((5, 7, 10), 1.35), ((6, 8, 11), 1.45), ((8, 10, 13), 1.66), ((9, 11, 14), 1.77)]
)
def test_transprune_layer_ablation(layers, published):
    assert tera(TransPrune(layers=layers).schedule(32).per_layer(576)) == pytest.approx(published, rel=0.01)


def test_transprune_behind_a_smaller_image():
    """On top of VisionZip with 288 and 192 tokens; the fractions are inferred from the printed TFLOPs."""
    schedule = TransPrune(fractions=(0.5, 0.25, 0.125)).schedule(32)
    assert tera(schedule.per_layer(288)) == pytest.approx(0.66, rel=0.01)
    assert tera(schedule.per_layer(192)) == pytest.approx(0.44, rel=0.01)


@pytest.mark.parametrize(("average", "published"), [(192, 1.25), (128, 0.83), (64, 0.42)])
def test_mustdrop_published_flops(average, published):
    """The printed values hold for the average number at every layer.

    A schedule of that average with 438 tokens after merging costs up to 1 % more, since its first three layers see them
    all and attention grows with the square.
    """
    counts = MustDrop().counts(438, 32, average)
    per_layer = [438] * 3 + [counts[0]] * 4 + [counts[1]] * 4 + [counts[2]] * 4 + [counts[3]] * 17
    assert sum(per_layer) / 32 == pytest.approx(average, abs=1)
    assert round(tera([average] * 32), 2) == published
    assert tera(per_layer) == pytest.approx(tera([average] * 32), rel=0.01)


# schedules ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("depth", [4, 8, 14, 28, 32, 40])
@pytest.mark.parametrize("share", [0.26, 0.3, 0.5, 0.9, 1.0])
def test_transprune_solves_for_an_average(depth, share):
    schedule = TransPrune().schedule(depth, share)
    assert schedule.average == pytest.approx(share)
    assert list(schedule.fractions) == sorted(schedule.fractions, reverse=True)
    per_layer = schedule.per_layer(1000)
    assert len(per_layer) == depth
    assert sum(per_layer) / depth == pytest.approx(1000 * share, abs=1)


def test_transprune_presets_lie_on_the_line():
    for preset in ("high", "low"):
        fixed = TransPrune(preset=preset).schedule(32)
        assert TransPrune().schedule(32, fixed.average).fractions == pytest.approx(fixed.fractions)


def test_transprune_shallow_models_scale_the_layers():
    assert TransPrune().schedule(40).layers == (9, 11, 15)
    assert TransPrune().schedule(8).layers == (2, 3)  # two cuts fall on one layer: the later one's share
    assert TransPrune().schedule(8).fractions == (0.625, 0.125)


def test_transprune_counts_are_truncated_in_binary():
    """As Python's ``int()`` in the official code: 0.29 · 100 is a little below 29; what ``keep`` solves for is not."""
    schedule = TransPrune(layers=(2, 3), fractions=(0.57, 0.29)).schedule(8)
    assert schedule.counts(100) == [56, 28]
    for n in (64, 97, 100, 180, 576):
        assert TransPrune().schedule(32, 1.0).counts(n) == [n] * 3


@torch.no_grad()
def test_transprune_growing_fractions_are_lowered(model, inputs):
    with pytest.warns(UserWarning, match="grow"):
        method = TransPrune(layers=(1, 2, 4), fractions=(0.5, 0.75, 0.25))
    assert method.fractions == (0.5, 0.5, 0.25)
    with vlmcompress.compress(model, method) as handle:
        model(**inputs)
        image = handle.last.samples[0].images[0]
        assert [len(image.kept_at(after)) for after in (1, 2, 4)] == [18, 18, 9]


def test_mustdrop_filters_scale():
    assert MustDrop().filters(32) == (2, 6, 10, 14)
    assert MustDrop().filters(40) == (2, 8, 12, 18)
    assert MustDrop().filters(8) == (0, 2, 4)


@pytest.mark.parametrize("keep", [10, 18, 0.4])
@torch.no_grad()
def test_keep_is_the_layer_average(model, inputs, keep):
    wanted = 3 * (keep if isinstance(keep, int) else keep * N)
    for method in ("transprune", MustDrop(keep=keep, layers=(0, 2, 3), merge=False)):
        options = {"keep": keep} if method == "transprune" else {}
        with vlmcompress.compress(model, method, **options) as handle:
            model(**inputs)
            assert wanted - 3 <= sum(handle.last.layer_tokens) / DEPTH <= wanted


@pytest.mark.parametrize(
    ("name", "options"),
    [("transprune", {"keep": N}), ("transprune", {"keep": 1.0}), ("transprune", {"keep": 999}),
     ("transprune", {"layers": (1, 2, 3), "fractions": (1.0, 1.0, 1.0)}),
     ("mustdrop", {"keep": N, "merge": False}), ("mustdrop", {"gamma": 0.0, "merge": False}),
     ("mustdrop", {"alpha": 0.0, "similarity": 1.1}), ("mustdrop", {"key_rate": 1.0, "similarity": 1.1})],
)  # fmt: skip
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_keeping_all_is_bit_identical(model, name, options, side):
    inputs = prompts([[5, "image", 7], [2, "image", 3, "image", 2]], N, side=side)
    before, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    with vlmcompress.compress(model, name, **options) as handle:
        assert model(**inputs).logits.equal(before)
        assert model.generate(**inputs, **GREEDY).equal(answer)
        assert handle.last.layer_tokens == [3 * N] * DEPTH


@torch.no_grad()
def test_text_only_prompts_pass_untouched(model):
    inputs = prompts([[9], [5]], N)
    before = model.generate(**inputs, **GREEDY)
    for name, options in (("transprune", STAGES), ("mustdrop", FILTERS)):
        with vlmcompress.compress(model, name, **options):
            assert model.generate(**inputs, **GREEDY).equal(before)


# method specifics -----------------------------------------------------------------------------------------------
@torch.no_grad()
def test_transprune_modes(model, inputs):
    kept = {}
    for label, options in {
        "both": {}, "ttv": {"alpha": 1.0}, "iga": {"alpha": 0.0}, "abs": {"alpha": 1.0, "direction": "abs"},
    }.items():  # fmt: skip
        with vlmcompress.compress(model, "transprune", **STAGES, **options) as handle:
            model(**inputs)
            kept[label] = handle.last.samples[0].images[0].kept_at(DEPTH - 1).tolist()
            assert handle.last.compressor_flops > 0
            assert len(kept[label]) == int(N * 0.2)
    assert len({tuple(k) for k in kept.values()}) > 2


@torch.no_grad()
def test_transprune_makes_no_full_states(model, inputs):
    """What is kept between hooks is two numbers per token and module."""
    sizes = []

    class Spy(TransPrune):
        def watch(self, layer, part, inputs, outputs, state):
            super().watch(layer, part, inputs, outputs, state)
            sizes.extend(t.shape for t in state["pending"][-1][1:])

    with vlmcompress.compress(model, Spy(**STAGES)):
        model(**inputs)
    assert sizes
    assert all(len(size) == 2 for size in sizes)


@torch.no_grad()
def test_mustdrop_floor_is_the_key_set(model, inputs):
    with vlmcompress.compress(
        model, "mustdrop", layers=(0,), gamma=1.5, alpha=1.5, merge=False, key_rate=0.1
    ) as handle:
        model(**inputs)
        assert handle.last.layer_tokens == [3 * N] + [3 * 4] * (DEPTH - 1)  # ceil(3.6) of each image


@torch.no_grad()
def test_mustdrop_merged_tokens_have_sources(model):
    inputs = prompts([[5, "image", 7], [2, "image", 3]], N)
    with vlmcompress.compress(model, "mustdrop", similarity=0.2, gamma=0.0) as handle:
        model(**inputs)
        for sample in handle.last.samples:
            image = sample.images[0]
            sources = image.sources
            assert sorted(torch.cat(sources).tolist()) == list(range(N))
            assert {len(s) for s in sources} <= {1, 9}
            assert len(image.kept) == len(sources) == sample.layer_tokens[0]


@torch.no_grad()
def test_mustdrop_clears_the_cache(model, inputs):
    lengths = {}
    for clear in (True, False):
        with vlmcompress.compress(model, "mustdrop", **FILTERS, merge=False, clear_cache=clear) as handle:
            model(**inputs, use_cache=True)
            lengths[clear] = handle.last.cache_lengths
    assert lengths[False] == sorted(lengths[False], reverse=True)
    assert set(lengths[True]) == {lengths[False][-1]}


@torch.no_grad()
def test_the_cache_stage_alone_behind_another_method(model, inputs):
    with vlmcompress.compress(model, TransPrune(**STAGES) + OutputCache(first=1)) as handle:
        model.generate(**inputs, **GREEDY)
        lengths = handle.last.cache_lengths
    assert len(set(lengths[1:])) == 1
    assert lengths[0] > lengths[1]


@torch.no_grad()
def test_behind_a_method_at_the_door(model, inputs):
    with vlmcompress.compress(model, VtcCls(keep=20) + TransPrune(**STAGES)) as handle:
        model.generate(**inputs, **GREEDY)
        assert handle.last.layer_tokens == [3 * k for k in (20, 16, 10, 10, 4, 4)]


@torch.no_grad()
def test_calibration(model):
    samples = [prompts([[5, "image", 7]], N, seed=s) for s in range(6)]
    method = MustDrop(layers=(0, 2, 3), merge=False)
    found = calibrate(model, samples, 20, method=method, tolerance=0.03)
    assert found.gamma == found.alpha > 0
    assert average_tokens(model, found, samples) == pytest.approx(20, rel=0.06)
    with pytest.raises(ValueError, match="whatever the thresholds"):
        calibrate(model, samples, 2, method=method)
    with pytest.raises(ValueError, match="at least one sample"):
        calibrate(model, [], 20)


# other backbones ------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_second_image_sees_the_first_turn(model):
    """A chunk with an image behind earlier text gives the rows that the whole prompt gives."""
    whole = prompts([[5, "image", 7]], N)
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    for method in (TransPrune(**STAGES), MustDrop(**FILTERS, merge=False)):
        with vlmcompress.compress(model, method) as handle:
            expected = model(**whole).logits[0, -1]
            kept = handle.last.samples[0].images[0].kept_at(DEPTH - 1)
            first = model(input_ids=whole["input_ids"][:, :3], use_cache=True)
            second = model(
                input_ids=whole["input_ids"][:, 3:], pixel_values=whole["pixel_values"], use_cache=True,
                **{keyword: first[keyword]},
            )  # fmt: skip
            if isinstance(method, MustDrop):  # TransPrune's softmax runs over the tokens of the chunk
                assert handle.last.samples[0].images[0].kept_at(DEPTH - 1).equal(kept)
                torch.testing.assert_close(second.logits[0, -1], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_grouped_queries_and_head_norms(attention):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=24, patch_size=4,
    )  # fmt: skip
    text = Qwen3Config(**{**TEXT, "num_hidden_layers": DEPTH, "eos_token_id": None}, head_dim=16)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    config.pad_token_id = PAD
    model = LlavaForConditionalGeneration(config).eval()
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.data.uniform_(0.5, 2)
        layer.self_attn.k_norm.weight.data.uniform_(0.5, 2)
    inputs = prompts([[5, "image", 7]], N)
    model.set_attn_implementation("eager")
    stock = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation(attention)
    rows = {}

    class Spy(TransPrune):
        def guidance(self, layer):
            rows.setdefault(layer.index, super().guidance(layer)[0])
            return rows[layer.index][None]

    with vlmcompress.compress(model, Spy(**STAGES)):
        model(**inputs)
    visual, question = slice(5, 5 + N), slice(5 + N, None)
    expected = stock[1][0, :, question, visual].mean(0).mean(0)
    torch.testing.assert_close(rows[0], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [("transprune", STAGES), ("mustdrop", {**FILTERS, "similarity": 0.4})])
@torch.no_grad()
def test_scores_are_fp32_under_bf16(name, options):
    model = tiny_llava(num_hidden_layers=DEPTH).to(torch.bfloat16)
    inputs = prompts([[5, "image", 7], [2, "image", 3]], N)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vlmcompress.compress(model, name, **options) as handle:
        assert model(**inputs).logits.dtype == torch.bfloat16
        assert handle.last.scores.dtype == torch.float32
        assert handle.last.layer_tokens[-1] < handle.last.layer_tokens[0]


@torch.no_grad()
def test_long_instructions_are_taken_in_pieces(model):
    inputs = prompts([[5, "image", 300]], N)
    largest = []

    class Spy(TransPrune):
        def prefill(self, layer, state):
            inner = layer._attention
            layer._attention = lambda rows, following: largest.append(rows.shape[1]) or inner(rows, following)
            return super().prefill(layer, state)

    with vlmcompress.compress(model, Spy(**STAGES)):
        model(**inputs)
    assert set(largest) == {256, 44}


# bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("transprune", {"preset": "medium"}, "preset is one of"),
        ("transprune", {"keep": 0}, "keeps nothing"),
        ("transprune", {"keep": 4, "fractions": (0.5, 0.4, 0.1)}, "either keep or fractions"),
        ("transprune", {"fractions": (0.5, 1.6, 0.1)}, "between 0 and 1"),
        ("transprune", {"fractions": (0.5, 0.1)}, "each cut needs one"),
        ("transprune", {"layers": (3, 2, 4)}, "ascending"),
        ("transprune", {"layers": (0, 2, 4)}, "from 1 up"),
        ("transprune", {"layers": (1, 2, 6)}, "no layer behind it"),
        ("transprune", {"alpha": 1.5}, "between 0 and 1"),
        ("transprune", {"direction": "up"}, "'signed' or 'abs'"),
        ("transprune", {"keep": 0.1}, "average share is at least"),
        ("mustdrop", {"preset": 100}, "preset is one of"),
        ("mustdrop", {"gamma": -1}, "at least 0"),
        ("mustdrop", {"layers": (3, 1)}, "ascending"),
        ("mustdrop", {"layers": (5,)}, "saves nothing"),
        ("mustdrop", {"key_rate": 0.0}, "something always stays"),
        ("mustdrop", {"window": 1}, "at least 2"),
        ("mustdrop", {"keep": 0.01}, "below what the layers"),
        ("output-cache", {"first": -1}, "at least 0"),
    ],
)
def test_bad_options(model, name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        vlmcompress.compress(model, name, **options)
    assert str(caught.value).count(". ") == 0
    assert not hasattr(model.config, "vlmcompress")


@torch.no_grad()
def test_budgets_that_an_image_cannot_meet(model, inputs):
    before = model(**inputs).logits
    for name, options, message in (
        ("transprune", {"keep": 3}, "average share is at least"),
        ("mustdrop", {"keep": 10, "key_rate": 0.5, "merge": False}, "key set of 18"),
    ):
        with vlmcompress.compress(model, name, **options), pytest.raises(ValueError, match=message):
            model(**inputs)
        assert model(**inputs).logits.equal(before)


def test_saved_and_restored(model, inputs):
    for name, options in (("transprune", STAGES), ("mustdrop", FILTERS)):
        with torch.no_grad(), vlmcompress.compress(model, name, **options) as handle:
            before = model(**inputs).logits
            saved = model.config.to_dict()["vlmcompress"]
        model.config.vlmcompress = {**saved, "methods": [
            {**m, "options": {k: list(v) if isinstance(v, tuple) else v for k, v in m["options"].items()}}
            for m in saved["methods"]
        ]}  # fmt: skip
        with torch.no_grad(), vlmcompress.restore(model) as handle:
            assert model(**inputs).logits.equal(before)
            assert handle.method.name == name
