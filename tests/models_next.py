# SPDX-License-Identifier: Apache-2.0
"""Tiny random LLaVA-NeXT models of the real class, and prompts with images of any size for them."""

from __future__ import annotations

import torch
from models import IMAGE, PAD, TEXT, TEXT_CONFIGS
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

TILE = 24
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
#: (height, width) in pixels: two by two unpadded, padded above and below, padded at the sides, three in a row, a column
SIZES = {"square": (48, 48), "wide": (30, 44), "tall": (44, 31), "row": (20, 70), "column": (50, 21)}


def tiny_next(
    text: str = "llama", attention: str = "sdpa", seed: int = 0, vision: dict | None = None, **text_options
) -> LlavaNextForConditionalGeneration:
    """LLaVA-NeXT with a 4-layer CLIP tower on views of 6 × 6 patches and a 4-layer text model."""
    torch.manual_seed(seed)
    tower = CLIPVisionConfig(**{
        **dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=TILE,
               patch_size=4, initializer_factor=4.0),
        **(vision or {}),
    })  # fmt: skip
    options = {**TEXT, **({"sliding_window": None} if text == "mistral" else {}), **text_options}
    config = LlavaNextConfig(
        vision_config=tower, text_config=TEXT_CONFIGS[text](**options), image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS, image_seq_length=(tower.image_size // tower.patch_size) ** 2,
    )  # fmt: skip
    config.pad_token_id = PAD
    model = LlavaNextForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    return model


def tokens_of(model: LlavaNextForConditionalGeneration, size: tuple[int, int]) -> tuple[int, int]:
    """(visual tokens, views) of an image of ``size`` (height, width), as the stock model packs it."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    vision = model.config.vision_config
    views = image_size_to_num_patches(list(size), model.config.image_grid_pinpoints, vision.image_size)
    features = torch.zeros(views, (vision.image_size // vision.patch_size) ** 2, 1)
    _, lengths = model.model.pack_image_features([features], [list(size)], "default", torch.zeros(1))
    return int(lengths[0]), views


def prompts_next(model, spec: list[list], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Batch from rows such as ``[5, "square", 7]``: five text tokens, an image of that size, seven text tokens.

    ``pixel_values`` [I, most views, 3, H, W] has zero views behind images with fewer crops, as the processor makes it.
    """
    generator = torch.Generator().manual_seed(seed)
    edge = model.config.vision_config.image_size
    rows, sizes, pictures = [], [], []
    for row in spec:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(4, 97, (part,), generator=generator).tolist()
                continue
            size = SIZES[part] if isinstance(part, str) else part
            n, views = tokens_of(model, size)
            ids += [IMAGE] * n
            sizes.append(size)
            pictures.append(torch.randn(views, 3, edge, edge, generator=generator))
        rows.append(ids)
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if pictures:
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pictures, batch_first=True)
        inputs["image_sizes"] = torch.tensor(sizes)
    return inputs


def one_row(inputs: dict[str, torch.Tensor], row: int, images: slice) -> dict[str, torch.Tensor]:
    """One row of a left-padded batch without its padding; ``images``: which of the batch's images are its own."""
    n = int(inputs["attention_mask"][row].sum())
    alone = {k: inputs[k][row : row + 1, -n:] for k in ("input_ids", "attention_mask")}
    return alone | {k: inputs[k][images] for k in ("pixel_values", "image_sizes")}
