# SPDX-License-Identifier: Apache-2.0
"""Tiny random LLaVA-OneVision and LLaVA-NeXT-Video of the real classes, and prompts with images and videos for them."""

from __future__ import annotations

import torch
from models import AHEAD, IMAGE, TEXT, padded
from models_next import SIZES, TILE
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

VIDEO = 96
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72], [72, 72]]
#: with four crops at most: a picture that is resized, and one that is not
HUGE = {"huge": (72, 66), **SIZES}


def tiny_onevision(attention: str = "sdpa", seed: int = 0, side: int = 6) -> LlavaOnevisionForConditionalGeneration:
    """LLaVA-OneVision with a 4-layer SigLIP tower on views of ``side`` × ``side`` patches and a 4-layer Qwen2 text model."""
    torch.manual_seed(seed)
    edge = 4 * side
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=edge, patch_size=4,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(**{**TEXT, "eos_token_id": None}), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=[[h * edge // TILE, w * edge // TILE] for h, w in PINPOINTS],
        vision_aspect_ratio="anyres_max_4", vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return _ready(LlavaOnevisionForConditionalGeneration(config), attention)


def tiny_next_video(
    attention: str = "sdpa", seed: int = 0, mode: str = "average"
) -> LlavaNextVideoForConditionalGeneration:
    """LLaVA-NeXT-Video with a 4-layer CLIP tower on views of 6 × 6 patches, pooled to 3 × 3 in videos."""
    torch.manual_seed(seed)
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=TILE, patch_size=4,
            initializer_factor=4.0,
        ),
        text_config=LlamaConfig(**{**TEXT, "eos_token_id": None}), image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS, image_seq_length=36, video_seq_length=9, spatial_pool_mode=mode,
    )  # fmt: skip
    return _ready(LlavaNextVideoForConditionalGeneration(config), attention)


def _ready(model, attention: str):
    for name, parameter in model.model.vision_tower.named_parameters():
        if "bias" not in name and "norm" not in name:
            parameter.data *= 2  # attention that is far from even
    model = model.eval()
    model.set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    return model


BUILDERS = {"llava_onevision": tiny_onevision, "llava_next_video": tiny_next_video}


def prompts_video(model, spec: list[list], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Batch from rows such as ``[5, "wide", 2, ("video", 3), 7]``: text, an image of that size, a video of three frames.

    The number of placeholders is what the stock model makes of the pixels, so ``model`` must not be compressed.
    """
    generator = torch.Generator().manual_seed(seed)
    edge, config = model.config.vision_config.image_size, model.config
    visual: dict[str, torch.Tensor] = {}
    parts = [part for row in spec for part in row]
    sizes = [HUGE[part] for part in parts if isinstance(part, str)]
    numbers = [sum(isinstance(part, str) for part in row) for row in spec]
    if sizes:
        from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

        alone = [n == 1 or config.model_type != "llava_onevision" for n in numbers for _ in range(n)]
        views = [
            image_size_to_num_patches(list(size), config.image_grid_pinpoints, edge) if cut else 1
            for size, cut in zip(sizes, alone, strict=True)
        ]
        pictures = [torch.randn(n, 3, edge, edge, generator=generator) for n in views]
        visual["pixel_values"] = torch.nn.utils.rnn.pad_sequence(pictures, batch_first=True)
        visual["image_sizes"] = torch.tensor(sizes)
        if config.model_type == "llava_onevision":
            visual["batch_num_images"] = torch.tensor(numbers)
    frames = [part[1] for part in parts if isinstance(part, tuple)]
    if frames:
        visual["pixel_values_videos"] = torch.randn(len(frames), frames[0], 3, edge, edge, generator=generator)
    images, videos = map(iter, features(model, visual))
    rows = []
    for row in spec:
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(4, 96, (part,), generator=generator).tolist()
            elif isinstance(part, str):
                ids += [IMAGE] * len(next(images))
            else:
                ids += [VIDEO] * len(next(videos))
        rows.append(ids)
    return padded(rows, side) | visual


@torch.no_grad()
def features(model, inputs: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the stock model feeds its language model of every image and every video, [tokens, D] each."""
    images, videos = [], []
    if "pixel_values" in inputs:
        given = {k: inputs[k] for k in ("pixel_values", "image_sizes", "batch_num_images") if k in inputs}
        images = list(model.model.get_image_features(**given).pooler_output)
    if "pixel_values_videos" in inputs:
        videos = [x.flatten(0, -2) for x in model.model.get_video_features(inputs["pixel_values_videos"]).pooler_output]
        if not AHEAD and model.config.model_type == "llava_onevision":  # the newline comes later there
            videos = [torch.cat([video, model.model.image_newline[None]]) for video in videos]
    return images, videos


def embeddings(model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """[B, S, D] embeddings of the prompt, all visual tokens in place. Call it before the model is compressed."""
    ids = inputs["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    for token, found in zip((IMAGE, VIDEO), features(model, inputs), strict=True):
        if found:
            embeds = embeds.masked_scatter((ids == token)[..., None], torch.cat(found))
    return embeds


def row_of(inputs: dict[str, torch.Tensor], spec: list[list], row: int) -> dict[str, torch.Tensor]:
    """One row of a left-padded batch on its own, without its padding and with its own images and videos."""
    n = int(inputs["attention_mask"][row].sum())
    alone = {k: inputs[k][row : row + 1, -n:] for k in ("input_ids", "attention_mask")}
    for kind, names in ((str, ("pixel_values", "image_sizes")), (tuple, ("pixel_values_videos",))):
        first, own = (sum(isinstance(p, kind) for r in rows for p in r) for rows in (spec[:row], [spec[row]]))
        if own:
            alone |= {k: inputs[k][first : first + own] for k in names}
    if "batch_num_images" in inputs and "pixel_values" in alone:
        alone["batch_num_images"] = inputs["batch_num_images"][row : row + 1]
    return alone
