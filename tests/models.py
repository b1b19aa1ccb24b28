# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the real classes, and prompts for them."""

from __future__ import annotations

import inspect

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

IMAGE, PAD, BOS, EOS = 3, 0, 1, 2
#: this transformers makes features ahead of generation. Older ones (5.16) repeat pixels for beams view by view, which
#: mixes up the images of a prompt that has several views: stock and compressed models answer alike, and wrongly
AHEAD = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
#: beams for prompts with several views
BEAMS = 2 if AHEAD else 1
TEXT = dict(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.15, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
)  # fmt: skip
TEXT_CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}


def tiny_llava(
    text: str = "llama", attention: str = "sdpa", seed: int = 0, side: int = 6, **text_options
) -> LlavaForConditionalGeneration:
    """LLaVA with a 4-layer CLIP tower on ``side`` × ``side`` patches and a 4-layer text model, weights drawn large enough that
    logits differ clearly."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=4 * side, patch_size=4,
        initializer_factor=4.0,
    )  # fmt: skip
    options = {**TEXT, **({"sliding_window": None} if text == "mistral" else {}), **text_options}
    config = LlavaConfig(
        vision_config=vision, text_config=TEXT_CONFIGS[text](**options), image_token_id=IMAGE,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    config.pad_token_id = PAD
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    return model


def prompts(
    spec: list[list[int | str]], tokens_per_image: int, side: str = "left", image_size: int = 24, seed: int = 1
):
    """Batch from rows such as ``[5, "image", 7]``: five text tokens, an image, seven text tokens.

    Returns model inputs: ``input_ids``, ``attention_mask`` and, where there is an image, ``pixel_values``.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, images = [], 0
    for row in spec:
        ids: list[int] = []
        for part in row:
            if part == "image":
                ids += [IMAGE] * tokens_per_image
                images += 1
            else:
                ids += torch.randint(4, 97, (int(part),), generator=generator).tolist()
        rows.append(ids)
    inputs = padded(rows, side)
    if images:
        inputs["pixel_values"] = torch.randn(images, 3, image_size, image_size, generator=generator)
    return inputs


def padded(rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` [B, S] of ragged rows."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def cached(output) -> dict:
    """The cache of a model's or a generation's output as the keyword that hands it on: its name is new in 5.24."""
    name = "cache" if "cache" in output else "past_key_values"
    return {name: output[name]}


def row_alone(inputs: dict[str, torch.Tensor], spec: list[list[int | str]], row: int) -> dict[str, torch.Tensor]:
    """One row of a left-padded batch of :func:`prompts`, without its padding and with its own images."""
    length, images = int(inputs["attention_mask"][row].sum()), spec[row].count("image")
    first = sum(parts.count("image") for parts in spec[:row])
    return {
        "input_ids": inputs["input_ids"][row : row + 1, -length:],
        "attention_mask": inputs["attention_mask"][row : row + 1, -length:],
        "pixel_values": inputs["pixel_values"][first : first + images],
    }
