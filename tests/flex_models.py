# SPDX-License-Identifier: Apache-2.0
"""Tiny models with fresh TokenFLEX projectors, and prompts of any count with the same pictures."""

from __future__ import annotations

import torch
from models import IMAGE, prompts, tiny_llava
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from vlmcompress import flex

N = 36
SPEC = [[5, "image", 7], [3, "image", 2, "image", 4]]
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])


def fresh(**options):
    model = tiny_llava(eos_token_id=None, **options)
    flex.install(model, counts=(4, 9, 36))
    return model


def native(tokens: int, spec=SPEC):
    """The prompts of ``spec`` with ``tokens`` places per picture, and the same pictures whatever the number."""
    inputs = prompts(spec, tokens)
    inputs["pixel_values"] = prompts(spec, N)["pixel_values"]
    return inputs


def tiny_siglip(strategy: str = "full"):
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=24, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    text = tiny_llava().config.text_config
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()
