# SPDX-License-Identifier: Apache-2.0
"""Tiny random InternVL, SmolVLM and Idefics3 (tiles, pixel shuffle), Gemma 3 and PaliGemma, and prompts for them.

Each family has a ``Family``: how to build the model, how many visual tokens a view makes, and how an image of a number
of tiles is written in a prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import IMAGE, PAD, TEXT, padded
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

TEXT_4 = {**TEXT, "eos_token_id": None}
FAKE, GLOBAL, NEWLINE, NEWLINES, START, END = 80, 81, 82, 83, 84, 85
TILE = 86  # the ids behind it name tiles
FRAME, FROM, COLON, SPACE, ZERO = 60, 61, 62, 63, 64  # the ids behind it are digits
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)


def _ready(model, config, attention: str):
    config.pad_token_id = PAD
    model = model(config).eval()
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if p.ndim > 1 or "cls_token" in name:  # drawn large enough that logits differ clearly
            p.data = torch.randn(p.shape, generator=generator) * (0.15 if p.ndim > 1 else 1.0)
        elif "lambda" in name:
            p.data.fill_(0.7)
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model


def internvl(attention: str = "sdpa", **vision):
    tower = {**VISION, "image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": False, **vision}
    config = InternVLConfig(
        vision_config=tower, text_config=Qwen2Config(**TEXT_4), image_token_id=IMAGE, image_seq_length=16,
        downsample_ratio=0.5,
    )  # fmt: skip
    return _ready(InternVLForConditionalGeneration, config, attention)


def smolvlm(attention: str = "sdpa", old: bool = False):
    config, model = (
        (Idefics3Config, Idefics3ForConditionalGeneration) if old else (SmolVLMConfig, SmolVLMForConditionalGeneration)
    )
    made = config(
        vision_config={**VISION, "image_size": 32, "patch_size": 4}, text_config=LlamaConfig(**TEXT_4),
        image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD,
    )  # fmt: skip
    return _ready(model, made, attention)


GEMMA = {**TEXT, "head_dim": 16, "eos_token_id": None}


def gemma3(attention: str = "sdpa", window: int = 12):
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, image_size=32, patch_size=4, vision_use_head=False),
        text_config=dict(
            **GEMMA, sliding_window=window, query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        mm_tokens_per_image=16, image_token_id=IMAGE, boi_token_index=START, eoi_token_index=END,
    )  # fmt: skip
    return _ready(Gemma3ForConditionalGeneration, config, attention)


def paligemma(attention: str = "sdpa", second: bool = False):
    text = dict(**GEMMA, model_type="gemma2" if second else "gemma")
    if second:
        text |= dict(sliding_window=12, query_pre_attn_scalar=16, attn_logit_softcapping=None)
    config = PaliGemmaConfig(
        vision_config=dict(
            **VISION, image_size=16, patch_size=4, model_type="siglip_vision_model", vision_use_head=False
        ),
        text_config=text,
        image_token_id=IMAGE, projection_dim=TEXT["hidden_size"],
    )  # fmt: skip
    # the second generation's Gemma has no fused attention
    return _ready(PaliGemmaForConditionalGeneration, config, "eager" if second else attention)


@dataclass(frozen=True)
class Family:
    build: Callable
    tokens: int = 16
    size: int = 32
    tiled: bool = False

    def written(self, model, tiles: tuple[int | str, int]) -> list[int]:
        """Ids of one image cut into ``tiles`` (rows, columns), (0, 0): not cut; ``("video", n)``: of n frames."""
        kind, view = model.config.model_type, [IMAGE] * self.tokens
        if tiles[0] == "video":
            frames = range(tiles[1])
            if kind == "internvl":
                lines = [[FRAME, ZERO + 1 + i, COLON, SPACE, START, *view, END, NEWLINE] for i in frames]
                return [token for line in lines for token in line][:-1]
            times = [[ZERO, ZERO, COLON, ZERO, ZERO + i, COLON] for i in frames]
            lines = [[NEWLINE, FRAME, FROM, SPACE, *time, FAKE, GLOBAL, *view, FAKE] for time in times]
            return [token for line in lines for token in line]
        rows, cols = tiles
        if kind == "internvl":
            return [START, *view * (rows * cols + bool(rows * cols) or 1), END]
        if kind == "gemma3":
            return [START, *view, END]
        if kind == "paligemma":
            return view
        ids: list[int] = []
        for row in range(rows):
            for col in range(cols):
                ids += [FAKE, TILE + row * cols + col, *view]
            ids += [NEWLINE] if row < rows - 1 else [NEWLINES]
        return [*ids, FAKE, GLOBAL, *view, FAKE]


#: families whose processors take videos, as frames among the images
VIDEOS = ("internvl", "smolvlm")
FAMILIES = {
    "internvl": Family(internvl, tiled=True),
    "internvl-qk-norm": Family(
        lambda attention="sdpa": internvl(attention, use_qk_norm=True, norm_type="rms_norm"), tiled=True
    ),
    "smolvlm": Family(smolvlm, tiled=True),
    "idefics3": Family(lambda attention="sdpa": smolvlm(attention, old=True), tiled=True),
    "gemma3": Family(gemma3),
    "paligemma": Family(paligemma, size=16),
    "paligemma-2": Family(lambda attention="sdpa": paligemma(attention, second=True), size=16),
}  # fmt: skip


def prompts(family: Family, model, spec: list[list], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Batch from rows such as ``[5, (0, 0), 7]``: five text tokens, an image of (rows, columns) tiles, seven text tokens.

    The thumbnail of an image is its picture, shrunk; ``token_type_ids`` are as the family's processor makes them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, views = [], []
    for row in spec:
        ids: list[int] = []
        mine: list[torch.Tensor] = []
        for part in row:
            if isinstance(part, tuple):
                ids += family.written(model, part)
                mine += picture(part, family.size, generator)
            else:
                ids += torch.randint(4, 80, (part,), generator=generator).tolist()
        rows.append(ids)
        views.append(mine)
    inputs = padded(rows, side)
    kind = model.config.model_type
    if any(views) and kind in ("smolvlm", "idefics3"):
        stacks = [torch.stack(v) if v else torch.zeros(0, 3, family.size, family.size) for v in views]
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(stacks, batch_first=True)
    elif any(views):
        inputs["pixel_values"] = torch.stack([v for mine in views for v in mine])
    if kind == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    if kind == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def picture(tiles: tuple[int | str, int], size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Views [3, size, size] of a random picture: its tiles in raster order, then its thumbnail; or of a random video."""
    rows, cols = tiles
    if rows == "video":
        return [torch.randn(3, size, size, generator=generator) for _ in range(cols)]
    if not rows * cols:
        return [torch.randn(3, size, size, generator=generator)]
    whole = torch.nn.functional.interpolate(
        torch.randn(1, 3, 4 * rows, 4 * cols, generator=generator), size=(rows * size, cols * size)
    )
    cut = whole[0].unflatten(1, (rows, size)).unflatten(3, (cols, size)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    small = torch.nn.functional.interpolate(whole, size=(size, size), mode="area")
    return [*cut, small[0]]


def views_of(part: tuple[int | str, int]) -> int:
    return part[1] if part[0] == "video" else part[0] * part[1] + 1


def one_row(inputs: dict[str, torch.Tensor], spec: list[list], row: int) -> dict[str, torch.Tensor]:
    """One row of a left-padded batch without its padding and with its own images."""
    n = int(inputs["attention_mask"][row].sum())
    alone = {k: v[row : row + 1, -n:] for k, v in inputs.items() if k != "pixel_values"}
    views = [sum(views_of(p) for p in parts if isinstance(p, tuple)) for parts in spec]
    pixels = inputs.get("pixel_values")
    if pixels is None or not views[row]:
        return alone
    mine = pixels[row : row + 1, : views[row]] if pixels.ndim == 5 else pixels.split(views)[row]
    return {**alone, "pixel_values": mine}
