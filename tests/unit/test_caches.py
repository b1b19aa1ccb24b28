# SPDX-License-Identifier: Apache-2.0
"""Caches other than the default one, a compiled step and looked-up drafts: for methods that finish before the language
model."""

from __future__ import annotations

import pytest
import torch
from models import AHEAD, cached, prompts, tiny_llava
from models_qwen import END, START, prompts_qwen, tiny_qwen
from models_qwen import IMAGE as QWEN_IMAGE
from models_qwen import VIDEO as QWEN_VIDEO
from models_tiles import FAMILIES as TILES
from models_tiles import prompts as prompts_tiles
from transformers import CompileConfig, StaticCache, cache_utils

import vlmcompress
from vlmcompress.compat import cache_keyword

GREEDY = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[3, QWEN_IMAGE, QWEN_VIDEO, START, END])
WATCHED = dict(output_logits=True, return_dict_in_generate=True)
METHODS = {"vtc-cls": {"keep": 5}, "pool": {"keep": 4}, "random": {"keep": 0.4}}
STATIC = dict(cache_implementation="static")
FP8 = dict(cache_implementation="quantized", cache_config={"backend": "fp8"})
needs_fp8 = pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers quantises with further packages only"
)


def _tiles(name: str, attention: str):
    family = TILES[name]
    model = family.build(attention)
    tiles = (1, 2) if family.tiled else (0, 0)
    return model, prompts_tiles(family, model, [[5, tiles, 7], [9, (0, 0), 4]])


def _llava(attention: str):
    return tiny_llava(attention=attention, eos_token_id=None), prompts([[5, "image", 7], [9, "image", 4]], 36)


MADE = {
    "llava": lambda: _llava("sdpa"),
    "llava eager": lambda: _llava("eager"),
    "qwen2_5_vl": lambda: (
        tiny_qwen(family="qwen2_5_vl"), prompts_qwen([[5, (4, 6), 7], [9, (4, 4), 4]], family="qwen2_5_vl"),
    ),
    "qwen3_vl": lambda: (
        tiny_qwen("eager", family="qwen3_vl"), prompts_qwen([[5, (4, 6), 7], [9, (4, 4), 4]], family="qwen3_vl"),
    ),
    "internvl": lambda: _tiles("internvl", "eager"),
    "smolvlm": lambda: _tiles("smolvlm", "sdpa"),
    "paligemma": lambda: _tiles("paligemma", "sdpa"),
}  # fmt: skip


@pytest.fixture(scope="module", params=MADE)
def made(request):
    return MADE[request.param]()


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_a_static_cache_answers_alike(made, name):
    """Greedily, with beams, and a second turn."""
    model, inputs = made
    more = torch.randint(4, 80, (2, 3), generator=torch.Generator().manual_seed(3))
    with vlmcompress.compress(model, name, **METHODS[name]) as handle:
        found = []
        for options in ({}, STATIC):
            beams = model.generate(**inputs, **GREEDY, **options, num_beams=2)
            room = (
                {cache_keyword(model): StaticCache(config=handle.adapter.text_config, max_cache_len=300)}
                if options
                else {}
            )
            first = model.generate(**inputs, **GREEDY, **WATCHED, **room)
            full = torch.cat([first.sequences, more], 1)
            longer = full.shape[1] - inputs["input_ids"].shape[1]
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, longer), value=1)
            second = model.generate(input_ids=full, attention_mask=mask, **cached(first), **GREEDY, **WATCHED)
            found.append((beams, first, second))
    (beams, first, second), (its_beams, its_first, its_second) = found
    assert isinstance(cached(its_second).popitem()[1], StaticCache)
    assert its_beams.equal(beams)
    assert its_second.sequences.equal(second.sequences)
    for ours, theirs in ((its_first, first), (its_second, second)):
        torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_compiled_step_answers_alike(made):
    model, inputs = made
    torch._dynamo.reset()
    compiling = CompileConfig(backend="eager", fullgraph=False, mode=None)
    compiling._compile_all_devices = True
    with vlmcompress.compress(model, "vtc-cls", keep=5):
        expected = model.generate(**inputs, **GREEDY)
        assert model.generate(**inputs, **GREEDY, **STATIC, compile_config=compiling).equal(expected)
    assert torch._dynamo.utils.counters["frames"]["ok"]


@needs_fp8
@torch.no_grad()
def test_a_quantized_cache_holds_what_entered(made):
    """It holds the kept tokens only, and is off by what quantising takes."""
    model, inputs = made
    with vlmcompress.compress(model, "vtc-cls", keep=5) as handle:
        plain = model.generate(**inputs, **GREEDY, **WATCHED)
        coarse = model.generate(**inputs, **GREEDY, **WATCHED, **FP8)
        entered = handle.last.frames[0].index.shape[1]
    assert coarse.logits[0].equal(plain.logits[0])  # the prompt sees its own keys as they are
    layer = cached(coarse).popitem()[1].layers[0]
    assert layer._quantized_keys[0].shape[2] == entered + 5
    assert layer.get_seq_length() == inputs["input_ids"].shape[1] + 5
    same = coarse.sequences[:, inputs["input_ids"].shape[1]].eq(plain.sequences[:, inputs["input_ids"].shape[1]])
    off = (coarse.logits[1] - plain.logits[1])[same].norm() / plain.logits[1][same].norm()
    assert 0 < off < 0.2


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_looked_up_drafts_change_nothing(made, name):
    model, inputs = made
    one = {
        k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
    }
    row = inputs["attention_mask"][0].bool()
    one = {k: v[:1, row] for k, v in one.items()}
    if "image_grid_thw" in inputs:
        n = int(inputs["image_grid_thw"][0].prod())
        one |= {"pixel_values": inputs["pixel_values"][:n], "image_grid_thw": inputs["image_grid_thw"][:1]}
    else:
        views = 3 if model.config.model_type == "internvl" else 1
        one["pixel_values"] = inputs["pixel_values"][:views]
    one["input_ids"][0, -5:] = one["input_ids"][0, :5]  # something to look up
    with vlmcompress.compress(model, name, **METHODS[name]):
        expected = model.generate(**one, **GREEDY)
        assert model.generate(**one, **GREEDY, prompt_lookup_num_tokens=3).equal(expected)


@pytest.mark.parametrize("options", [STATIC, pytest.param(FP8, marks=needs_fp8)], ids=["static", "quantized"])
@pytest.mark.parametrize("name", ["fastv", "keep-last", "mustdrop"])
@torch.no_grad()
def test_methods_inside_the_language_model_are_refused(made, name, options):
    model, inputs = made
    if model.config.model_type == "paligemma":
        with pytest.raises(ValueError, match="does not work on 'paligemma'"):
            vlmcompress.compress(model, name)
        return
    before = model.generate(**inputs, **GREEDY, **options)
    choice = {"budget": 16} if name == "keep-last" else {"layers": (0, 1)} if name == "mustdrop" else {"keep": 4}
    with vlmcompress.compress(model, name, **choice), pytest.raises(ValueError, match="cannot give up entries"):
        model.generate(**inputs, **GREEDY, **options)
    assert model.generate(**inputs, **GREEDY, **options).equal(before)


@pytest.mark.skipif(not AHEAD, reason="the stock Gemma 3 of this transformers takes no static cache either")
@torch.no_grad()
def test_windows_in_a_static_cache_are_refused():
    model, inputs = _tiles("gemma3", "sdpa")
    with vlmcompress.compress(model, "grid", keep=4), pytest.raises(ValueError, match="StaticSlidingWindowLayer"):
        model.generate(**inputs, **GREEDY, **STATIC)
