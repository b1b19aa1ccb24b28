# SPDX-License-Identifier: Apache-2.0
"""Models whose Linears hold quantised weights (torchao, bitsandbytes), on the CPU as ``from_pretrained`` loads them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import prompts, tiny_llava
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import BitsAndBytesConfig, TorchAoConfig

import vlmcompress

sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
from cells import OPTIONS
from slow import check
from stories import STORIES

#: of every way to look at a model: vision rows, next layer's CLS, whole tokens, decoder rows, values, cache, no token
METHODS = ["vtc-cls", "globalcom2", "flowcut", "tome", "pool", "transprune", "todre", "mustdrop", "h2o", "no-vision"]
FAMILIES = ["llava", "qwen2_5_vl", "internvl"]


def quantised(model: Any, folder: Path, settings: Any) -> Any:
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder, quantization_config=settings, device_map="cpu", dtype=torch.float32)
    loaded.generation_config.eos_token_id = None
    return loaded.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_weights_equal_the_slow_reference(family, tmp_path):
    """torchao keeps the module and exchanges its weight."""
    story = STORIES[family]
    model = quantised(story.build("sdpa"), tmp_path, TorchAoConfig(Int8WeightOnlyConfig()))
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    assert type(weight.data) is not torch.Tensor
    inputs = story.write(model, story.specs["ragged"])
    for name in METHODS:
        if vlmcompress.support(name, family)[0]:
            check(model, name, OPTIONS[name], inputs, "greedy", story.special)


@torch.no_grad()
def budgets_hold(model: Any, plain: Any, inputs: dict[str, torch.Tensor], family: str) -> None:
    """As many tokens in every layer as in the model before it was quantised, keep-everything and removal as stock.

    Kernels that round the states too give other logits for another order of the same sums, so none are compared.
    """
    options = dict(max_new_tokens=3, do_sample=False, suppress_tokens=list(STORIES[family].special))
    before, stock = model(**inputs).logits, model.generate(**inputs, **options)
    for name in METHODS:
        if not vlmcompress.support(name, family)[0]:
            continue
        with vlmcompress.compress(plain, name, **OPTIONS[name]) as handle:
            plain.generate(**inputs, **options)
            expected = handle.last.layer_tokens
        with vlmcompress.compress(model, name, **OPTIONS[name]) as handle:
            out = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
            assert handle.last.layer_tokens == expected, name
            assert torch.stack(out.logits).isfinite().all()
    for name in ("vtc-cls", "pool", "fastv"):
        with vlmcompress.compress(model, name, keep=1.0):
            assert model.generate(**inputs, **options).equal(stock)
    assert model(**inputs).logits.equal(before)


def test_four_bit_weights(tmp_path):
    """bitsandbytes, whose kernel for CPUs takes widths that are multiples of 64: the text model's here."""
    others = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    settings = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=others)
    plain = tiny_llava(intermediate_size=128, eos_token_id=None)
    model = quantised(plain, tmp_path, settings)
    assert type(model.model.language_model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    budgets_hold(model, plain, prompts([[5, "image", 7], [9, "image", 4]], 36), "llava")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["torchao", "bitsandbytes"])
def test_eight_bit_activations(family, kind, tmp_path):
    dynamic = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    settings = dynamic if kind == "torchao" else BitsAndBytesConfig(load_in_8bit=True)
    story = STORIES[family]
    plain = story.build("sdpa")
    budgets_hold(quantised(plain, tmp_path, settings), plain, story.write(plain, story.specs["ragged"]), family)
