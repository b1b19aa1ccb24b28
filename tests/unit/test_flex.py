# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX on stock models: installing, choosing the count, saving and loading, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from flex_models import GREEDY, IMAGE, SPEC, N, fresh, native, tiny_siglip
from models import tiny_llava
from models_next import prompts_next, tiny_next
from torch.utils.flop_counter import FlopCounterMode

import vlmcompress
from vlmcompress import flex
from vlmcompress.eval import flops, profiles
from vlmcompress.method import create
from vlmcompress.methods.tokenflex import TokenFlex
from vlmcompress.projectors.tokenflex import TokenFlexProjector


@pytest.fixture(scope="module")
def model():
    return fresh()


def slow(model, tokens: int, spec=SPEC):
    """Last logits by hand: pooled features in the places of a prompt that has ``tokens`` of them."""
    inputs, core = native(tokens, spec), model.model
    seen = core.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    side = round(tokens**0.5)
    pooled = torch.nn.functional.adaptive_avg_pool2d(seen.mT.unflatten(2, (6, 6)), side).flatten(2).mT
    part = core.multi_modal_projector.mlp
    z = part.norm(pooled)
    image = part.down(torch.nn.functional.silu(part.gate(z)) * part.up(z))
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], image)
    return model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits[:, -1]


# counts ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 25, 36, 49, 144])
@torch.no_grad()
def test_the_prompt_decides(model, tokens):
    torch.testing.assert_close(model(**native(tokens)).logits[:, -1], slow(model, tokens), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 4, 9, 16, 25, 36])
@torch.no_grad()
def test_compress_use_and_native_prompts_agree(model, tokens):
    wanted = model(**native(tokens)).logits[:, -1]
    answers = model.generate(**native(tokens), **GREEDY)[:, -4:]
    stock = native(N)
    with vlmcompress.compress(model, "tokenflex", keep=tokens) as handle:
        logits = model(**stock).logits
        assert logits.shape[1] == stock["input_ids"].shape[1]
        torch.testing.assert_close(logits[:, -1], wanted, atol=1e-5, rtol=1e-4)
        assert model.generate(**stock, **GREEDY)[:, -4:].equal(answers)
        assert [len(i.kept) for s in handle.last.samples for i in s.images] == [tokens] * 3
        assert handle.last.layer_tokens == [3 * tokens] * 4
        report = handle.report()
        assert (report.tokens_before, report.tokens) == (3 * N, 3 * tokens)
        sources = [x for image in handle.last.samples[1].images for x in image.sources]
        assert sum(map(len, sources)) == 2 * N
    with flex.use(model, tokens):
        assert model(**stock).logits.equal(logits)


@torch.no_grad()
def test_the_count_changes_without_loading(model):
    stock, before = native(N), {k: v.data_ptr() for k, v in model.state_dict().items()}
    for tokens in (4, 36, 9, 4):
        handle = flex.use(model, tokens)
        model(**stock)
        assert handle.last.layer_tokens[0] == 3 * tokens
    assert {k: v.data_ptr() for k, v in model.state_dict().items()} == before
    handle.remove()
    assert flex.use(model).method.methods[0].keep == 36  # the model's own count
    flex.use(model).remove()


@torch.no_grad()
def test_beams_and_a_share(model):
    beams = dict(num_beams=3, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])
    wanted = model.generate(**native(9), **beams)[:, -3:]
    with vlmcompress.compress(model, "tokenflex", keep=0.3) as handle:  # 10.8 of 36: 3 × 3 fit
        assert model.generate(**native(N), **beams)[:, -3:].equal(wanted)
        assert [len(i.kept) for i in handle.last.samples[0].images] == [9]


@torch.no_grad()
def test_everything_kept_is_the_uncompressed_model(model):
    inputs = native(N)
    stock = model(**inputs).logits
    for keep in (36, 1000, 1.0):
        with vlmcompress.compress(model, "tokenflex", keep=keep):
            assert model(**inputs).logits.equal(stock)
    assert model(**inputs).logits.equal(stock)


@pytest.mark.parametrize(
    "second", [create("transprune"), create("fastv", keep=3), create("keep-last", budget=12)], ids=lambda m: m.name
)
@torch.no_grad()
def test_composes_with_prefill_and_cache(model, second):
    with vlmcompress.compress(model, second):
        wanted = model.generate(**native(16), **GREEDY)[:, -4:]
    with vlmcompress.compress(model, TokenFlex(keep=16) + second) as handle:
        assert model.generate(**native(N), **GREEDY)[:, -4:].equal(wanted)
        assert handle.last.layer_tokens[0] == 3 * 16


@torch.no_grad()
def test_methods_that_choose_work_on_pooled_tokens(model):
    inputs = native(9)
    for name in ("random", "grid"):
        with vlmcompress.compress(model, name, keep=4) as handle:
            model(**inputs)
            assert [(i.n_original, len(i.kept)) for i in handle.last.samples[1].images] == [(9, 4)] * 2


@torch.no_grad()
def test_threads_of_one_count_and_two_models_do_not_meet(model):
    other = fresh(seed=3)
    alone = other(**native(9)).logits
    model(**native(4))
    assert other.model.multi_modal_projector.num_image_tokens == 9
    assert other(**native(9)).logits.equal(alone)


def test_gradients_reach_every_part():
    model = fresh().train()
    inputs = native(9)
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_bf16(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = native(9) | {"pixel_values": native(9)["pixel_values"].bfloat16()}
    assert half(**inputs).logits.isfinite().all()
    assert half.generate.__self__ is half


@torch.no_grad()
def test_flops_agree_with_torch():
    model = fresh(attention="eager")  # torch does not count the CPU's fused attention
    one = native(N, [[5, "image", 7]])
    with vlmcompress.compress(model, "tokenflex", keep=9) as handle, FlopCounterMode(display=False) as counter:
        model(**one, logits_to_keep=1)
    shape = flops.ModelShape.from_config(model.config)
    parts = [flops.full_count(shape, p) for p in profiles.compressed(shape, handle.last)]
    assert sum(p.total - p.compressor for p in parts) == pytest.approx(counter.get_total_flops(), rel=0.02)


# families -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_siglip_with_and_without_its_final_norm():
    model = tiny_siglip()
    tower, pixels = model.model.vision_tower, native(9)["pixel_values"]
    tower.post_layernorm.weight.mul_(3)
    seen = tower(pixels, output_hidden_states=True)
    assert not seen.hidden_states[-1].allclose(seen.last_hidden_state, atol=1e-2)
    for norm, features in ((False, seen.hidden_states[-1]), (True, seen.last_hidden_state)):
        torch.manual_seed(1)
        projector = flex.install(model, counts=(4, 9), apply_post_layernorm=norm)
        assert not any("tower_norm" in key for key in model.state_dict())
        plain = TokenFlexProjector(32, 64, num_image_tokens=9)
        plain.load_state_dict(projector.state_dict())
        model(**native(9))
        got = torch.stack(list(model.model.get_image_features(pixels).pooler_output))
        torch.testing.assert_close(got, plain(features))
        with vlmcompress.compress(model, "tokenflex", keep=4) as handle:
            model(**native(N))
            assert handle.last.layer_tokens[0] == 12
    copied = copy.deepcopy(model).model
    assert copied.multi_modal_projector.__dict__["tower_norm"] is copied.vision_tower.post_layernorm


@torch.no_grad()
def test_several_vision_layers_are_joined():
    model = tiny_llava(eos_token_id=None)
    model.config.vision_feature_layer = [1, 3]
    assert flex.install(model, counts=(4, 9)).mlp.norm.normalized_shape == (64,)
    assert model(**native(9)).logits.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 4, 9])
@torch.no_grad()
def test_llava_next_pools_every_view(tokens):
    model = tiny_next(eos_token_id=None)
    flex.install(model, counts=(4, 9))
    inputs = prompts_next(model, [[5, "square", 7], [3, "wide", 4]])
    everything = model(**inputs).logits
    with flex.use(model, tokens) as handle:
        logits = model(**inputs).logits
        square = handle.last.samples[0].images[0]
        views = len(square.views[~square.is_newline].unique())
        kept = square.kept
        assert int((~square.is_newline[kept]).sum()) == tokens * views  # the paper's N · (tiles + 1)
        assert int(square.is_newline[kept].sum()) == 2 * round(tokens**0.5)  # one per row of the picture
        assert logits[:, -1].isfinite().all() and not logits[:, -1].allclose(everything[:, -1])
        single = {k: inputs[k][:1] for k in ("input_ids", "attention_mask", "pixel_values", "image_sizes")}
        real = single["attention_mask"][0].bool()
        single["input_ids"], single["attention_mask"] = (single[k][:, real] for k in ("input_ids", "attention_mask"))
        torch.testing.assert_close(model(**single).logits[:, -1], logits[:1, -1], atol=1e-4, rtol=1e-4)
    assert model(**inputs).logits.equal(everything)
    with vlmcompress.compress(model, "tokenflex", keep=20) as handle:
        model(**inputs)
        for image in (s.images[0] for s in handle.last.samples):
            assert int((~image.is_newline[image.kept]).sum()) <= 20


def test_the_projector_costs_no_more_than_two_percent_of_the_tower():
    """Against the two layers it replaces, at CLIP-L and a 7 B language model, in operations."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(hidden_size=4096))
    profile = flops.Profile((576,) * 32, 60, (577,) * 24, 1, 576)
    stock = flops.full_count(flops.ModelShape.from_config(config), profile)
    config.tokenflex = {"hidden_ratio": 3}
    shape = flops.ModelShape.from_config(config)
    for tokens in (64, 144, 256, 576):
        ours = flops.full_count(shape, flops.Profile((tokens,) * 32, 60, (577,) * 24, 1, tokens)).projector
        assert ours - stock.projector <= 0.02 * stock.tower
        assert ours == 2 * tokens * (2 * 3 * 1024**2 + 3 * 1024 * 4096)
