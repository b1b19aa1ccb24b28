# SPDX-License-Identifier: Apache-2.0
"""Model folders of the other served families: random weights, or tiny-llava-next, each with its stock processor.

Heads have 32 channels, which vLLM's CPU attention knows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

from vlmcompress.training.processor import build_tokenizer, words
from vlmcompress.training.tiny_qwen_data import MERGE, PATCH, qwen_processor

TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
    head_dim=32, initializer_range=0.2, max_position_embeddings=2048,
)  # fmt: skip
HALF = [0.5, 0.5, 0.5]


def _text(tokenizer) -> dict:
    return dict(
        **TEXT, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )  # fmt: skip


def _save(model, processor, folder: Path) -> Path:
    """Weights drawn large enough that answers differ from image to image."""
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if "language_model" in name or "lm_head" in name:
            continue
        if p.ndim > 1:
            p.data = torch.randn(p.shape, generator=generator) * 0.15
        elif "image_newline" in name or "cls_token" in name:
            p.data = torch.randn(p.shape, generator=generator)
        elif "lambda" in name:
            p.data.fill_(0.7)
    model.generation_config.eos_token_id = None
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(visual: dict[str, str]):
    """The small models' tokenizer, with the special tokens ``visual`` in its unused places."""
    found = words()
    free = (i for i, word in enumerate(found) if word.startswith("<unused"))
    for word in visual.values():
        if word not in found:
            found[next(free)] = word
    return build_tokenizer(found, visual)


def onevision(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = _tokenizer({"image_token": "<image>", "video_token": "<video>"})
    edge, pinpoints = 24, [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72], [72, 72]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=edge,
            patch_size=4, vision_use_head=False,
        ),
        text_config=Qwen2Config(**_text(tokenizer)), image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    pixels = dict(size={"height": edge, "width": edge}, image_mean=HALF, image_std=HALF)
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(**pixels, image_grid_pinpoints=pinpoints), tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(**pixels), num_image_tokens=36,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    return _save(LlavaOnevisionForConditionalGeneration(config), processor, folder)


def internvl(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = _tokenizer({
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    })  # fmt: skip
    config = InternVLConfig(
        vision_config=dict(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=[32, 32],
            patch_size=[4, 4], use_qk_norm=False,
        ),
        text_config=Qwen2Config(**_text(tokenizer)), image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16, downsample_ratio=0.5,
    )  # fmt: skip
    pixels = dict(size={"height": 32, "width": 32}, image_mean=HALF, image_std=HALF)
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(**pixels, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer=tokenizer, video_processor=InternVLVideoProcessor(**pixels), image_seq_length=16,
    )  # fmt: skip
    return _save(InternVLForConditionalGeneration(config), processor, folder)


QWEN_VISION = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, dict(embed_dim=64, mlp_ratio=2, patch_size=PATCH)),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, dict(
        window_size=4 * PATCH * MERGE, fullatt_block_indexes=[1, 3], patch_size=PATCH,
    )),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, dict(
        num_position_embeddings=64, deepstack_visual_indexes=[0, 2], patch_size=PATCH,
    )),
}  # fmt: skip


def qwen2_vl(folder: Path) -> Path:
    old = qwen_processor()
    processor = Qwen2VLProcessor(
        image_processor=old.image_processor, tokenizer=old.tokenizer, video_processor=old.video_processor,
        chat_template=old.chat_template,
    )  # fmt: skip
    return _qwen("qwen2_vl", processor, folder)


def qwen2_5_vl(folder: Path) -> Path:
    return _qwen("qwen2_5_vl", qwen_processor(), folder)


def qwen3_vl(folder: Path) -> Path:
    old = qwen_processor()
    pixels = dict(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=2, size=dict(old.image_processor.size), image_mean=HALF,
        image_std=HALF,
    )  # fmt: skip
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels), tokenizer=old.tokenizer,
        video_processor=Qwen3VLVideoProcessor(**pixels), chat_template=old.chat_template,
    )  # fmt: skip
    return _qwen("qwen3_vl", processor, folder)


def _qwen(family: str, processor, folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{text}|>")
        for name, text in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
                           ("vision_end", "vision_end"))
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True  # as the hub's configurations say, and transformers does without asking
    config_class, model_class, vision = QWEN_VISION[family]
    config = config_class(
        vision_config=dict(
            depth=4, hidden_size=64, intermediate_size=96, num_heads=2, spatial_merge_size=MERGE, temporal_patch_size=2,
            out_hidden_size=TEXT["hidden_size"], **vision,
        ),
        text_config=dict(**_text(tokenizer), rope_parameters=rope), **ids,
    )  # fmt: skip
    return _save(model_class(config), processor, folder)
