# SPDX-License-Identifier: Apache-2.0
"""Tiny random Qwen2-VL, and prompts for it."""

from __future__ import annotations

import torch
from models import BOS, PAD, padded
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

IMAGE, VIDEO, START, END = 90, 91, 92, 93
PATCH, MERGE = 4, 2
ROW = 3 * 2 * PATCH * PATCH


def tiny_qwen(attention: str = "sdpa", seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL with a 4-block tower and a 4-layer text model, weights drawn large enough that logits differ clearly."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        vision_config=dict(
            depth=4, embed_dim=32, hidden_size=64, num_heads=4, mlp_ratio=2, patch_size=PATCH, spatial_merge_size=MERGE,
            temporal_patch_size=2, initializer_range=0.15,
        ),
        text_config=dict(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.15, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        ),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model


def prompts_qwen(spec: list[list], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Batch from rows such as ``[5, (4, 6), 7]``: five text tokens, an image of 4 × 6 merged tokens, seven text tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows, grids, pixels = [], [], []
    for row in spec:
        ids: list[int] = []
        for part in row:
            if isinstance(part, tuple):
                h, w = part
                ids += [START] + [IMAGE] * (h * w) + [END]
                grids.append([1, h * MERGE, w * MERGE])
                pixels.append(torch.randn(h * w * MERGE**2, ROW, generator=generator))
            else:
                ids += torch.randint(4, 90, (part,), generator=generator).tolist()
        rows.append(ids)
    inputs = padded(rows, side)
    if grids:
        inputs |= {"pixel_values": torch.cat(pixels), "image_grid_thw": torch.tensor(grids)}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    return inputs


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch on its own, without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {k: inputs[k][row : row + 1, real] for k in ("input_ids", "attention_mask", "mm_token_type_ids")}
    images = [0, *(inputs["input_ids"] == START).sum(1).cumsum(0).tolist()]
    grid = inputs["image_grid_thw"]
    pieces = inputs["pixel_values"].split(grid.prod(1).tolist())
    mine = slice(images[row], images[row + 1])
    return alone | {"pixel_values": torch.cat(pieces[mine]), "image_grid_thw": grid[mine]}
