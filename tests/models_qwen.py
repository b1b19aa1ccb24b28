# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the Qwen vision-language families, and prompts with images and videos for them."""

from __future__ import annotations

import torch
from models import BOS, PAD, padded
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

IMAGE, VIDEO, START, END = 90, 91, 92, 93
PATCH, MERGE = 4, 2
ROW = 3 * 2 * PATCH * PATCH
VISION = dict(
    depth=4, num_heads=4, patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=2, initializer_range=0.15
)
#: windows of 2 × 2 tokens in layers 0 and 2; DeepStack features of layers 0 and 2 behind decoder layers 0 and 1
FAMILIES = {
    "qwen2_vl": (
        Qwen2VLConfig, Qwen2VLForConditionalGeneration, [2, 3, 3], dict(embed_dim=32, hidden_size=64, mlp_ratio=2),
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, [2, 3, 3],
        dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, window_size=4 * PATCH, fullatt_block_indexes=[1, 3]),
    ),
    "qwen3_vl": (
        Qwen3VLConfig, Qwen3VLForConditionalGeneration, [4, 2, 2],
        dict(hidden_size=32, intermediate_size=48, out_hidden_size=64, num_position_embeddings=64,
             deepstack_visual_indexes=[0, 2]),
    ),
}  # fmt: skip


def tiny_qwen(attention: str = "sdpa", seed: int = 0, family: str = "qwen2_vl"):
    """A Qwen model with a 4-block tower and a 4-layer text model, weights drawn large enough that logits differ clearly."""
    torch.manual_seed(seed)
    config_class, model_class, sections, vision = FAMILIES[family]
    config = config_class(
        vision_config={**VISION, **vision},
        text_config=dict(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, initializer_range=0.15, pad_token_id=PAD, bos_token_id=BOS,
            eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections},
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    model = model_class(config).eval()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model


def prompts_qwen(
    spec: list[list], side: str = "left", seed: int = 1, family: str = "qwen2_vl"
) -> dict[str, torch.Tensor]:
    """Batch from rows such as ``[5, (4, 6), 7, (3, 2, 2), 1]``.

    That is five text tokens, an image of 4 × 6 merged tokens, seven text tokens, a video of three frames (each made of
    two) of 2 × 2 merged tokens, and one more text token. Qwen3-VL puts a timestamp of three text tokens in front of
    every frame of a video.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    pixels: dict[str, list] = {"image": [], "video": []}
    grids: dict[str, list] = {"image": [], "video": []}

    def text(n: int) -> list[int]:
        return torch.randint(4, 90, (n,), generator=generator).tolist()

    for row in spec:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += text(part)
                continue
            kind = "image" if len(part) == 2 else "video"
            t, h, w = (1, *part)[-3:]
            grids[kind].append([t, h * MERGE, w * MERGE])
            pixels[kind].append(torch.randn(t * h * w * MERGE**2, ROW, generator=generator))
            if kind == "image":
                ids += [START] + [IMAGE] * (h * w) + [END]
            elif family == "qwen3_vl":
                for _ in range(t):
                    ids += [*text(3), START, *[VIDEO] * (h * w), END]
            else:
                ids += [START] + [VIDEO] * (t * h * w) + [END]
        rows.append(ids)
    inputs = padded(rows, side)
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[kind]:
            inputs |= {name: torch.cat(pixels[kind]), f"{kind}_grid_thw": torch.tensor(grids[kind])}
    if grids["video"] and family == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.arange(1, 1 + len(grids["video"])) * 0.5
    return inputs | typed(inputs["input_ids"])


def typed(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """``mm_token_type_ids`` of a prompt with visual tokens: 1 for images, 2 for videos."""
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return {"mm_token_type_ids": kinds} if bool(kinds.any()) else {}


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch on its own, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {k: inputs[k][row : row + 1, real] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    for kind, name, token in (("image", "pixel_values", IMAGE), ("video", "pixel_values_videos", VIDEO)):
        if name not in inputs:
            continue
        grid = inputs[f"{kind}_grid_thw"]
        tokens = (grid.prod(1) // MERGE**2).cumsum(0)
        seen = (inputs["input_ids"] == token).sum(1).cumsum(0)
        first, last = ((tokens <= n).sum() for n in (seen[row] - (inputs["input_ids"][row] == token).sum(), seen[row]))
        if first == last:
            continue
        pieces = inputs[name].split(grid.prod(1).tolist())
        alone |= {name: torch.cat(pieces[first:last]), f"{kind}_grid_thw": grid[first:last]}
        if kind == "video" and "second_per_grid_ts" in inputs:
            alone["second_per_grid_ts"] = inputs["second_per_grid_ts"][first:last]
    return alone
