# SPDX-License-Identifier: Apache-2.0
"""A prompt of one noise picture and random text for a model that has no processor, only a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import vision_utils


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _clip(config: Any) -> Any:
    side = config.vision_config.image_size
    return transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=_square(side))


def _llava_next(config: Any) -> Any:
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    return transformers.LlavaNextImageProcessor(
        size={"shortest_edge": side}, crop_size=_square(side), image_grid_pinpoints=pinpoints
    )


def _llava_onevision(config: Any) -> Any:
    size = _square(config.vision_config.image_size)
    return transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints)


def _qwen(config: Any) -> Any:
    vision = config.vision_config
    return transformers.Qwen2VLImageProcessor(
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
    )


def _internvl(config: Any) -> Any:
    height, width = config.vision_config.image_size
    return transformers.GotOcr2ImageProcessor(
        size={"height": height, "width": width}, crop_to_patches=True, min_patches=1, max_patches=12
    )


#: family → its image processor, set up from the configuration alone
IMAGE_PROCESSORS: dict[str, Callable[[Any], Any]] = {
    "llava": _clip,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
}


def pixels(config: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """What the family's image processor makes of a noise picture of ``size`` (height, width) pixels, never zeros.

    Raises ``ValueError`` for a family whose image processor is not known here.
    """
    make = IMAGE_PROCESSORS.get(config.model_type)
    if make is None:
        known = ", ".join(IMAGE_PROCESSORS)
        raise ValueError(f"No picture can be made up for the family '{config.model_type}', only for {known}.")
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    made = make(config)(images=Image.fromarray(noise), return_tensors="pt")
    return {k: v for k, v in made.items() if k not in ("num_patches", "batch_num_images")}


def prompt(model: Any, size: tuple[int, int], text_tokens: int) -> dict[str, Tensor]:
    """Inputs of ``model``: half of the text, the picture, the other half; batch 1, on the model's device."""
    from ..adapters.base import adapter_for

    config, given = model.config, pixels(model.config, size)
    # without a prompt a family that tells by it which views make a picture takes every view for one of its own
    n = sum(adapter_for(model).geometry(given).n)
    image = torch.full((n,), config.image_token_id)
    if getattr(config, "vision_start_token_id", None) is not None:
        image = torch.cat([torch.tensor([config.vision_start_token_id]), image])
    special = {getattr(config, name, None) for name in ("image_token_id", "video_token_id", "vision_start_token_id")}
    plain = torch.tensor([t for t in range(3, 40) if t not in special])
    text = plain[torch.randint(len(plain), (text_tokens,), generator=torch.Generator().manual_seed(0))]
    ids = torch.cat([text[: text_tokens // 2], image, text[text_tokens // 2 :]])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}
    if "image_grid_thw" in given:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    return {k: v.to(model.device) for k, v in inputs.items()}


def batch_of(one: dict[str, Tensor], rows: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """``rows`` prompts like the one of :func:`prompt`, each with a noise picture of its own, floats as ``dtype``."""
    generator = torch.Generator().manual_seed(1)
    inputs = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in one.items()}
    for name, value in inputs.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator).to(value.device)
            inputs[name] = (value + 0.1 * noise).to(dtype)
    return inputs


def packed_arguments(config: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a tower for packed views would compute from the grid, ready-made: on the meta device it could not read it.

    Empty for other towers. Sequence lengths stay on the CPU, where the attention reads them; the rest has no data.
    """
    grid = given.get("image_grid_thw")
    if grid is None:
        return {}
    vision = config.vision_config
    merge = vision.spatial_merge_size
    found = {"position_ids": vision_utils.get_vision_position_ids(grid, merge).to("meta")}
    found["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grid)
    if hasattr(vision, "window_size"):
        window, lengths = vision_utils.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=vision.window_size, patch_size=vision.patch_size
        )
        found |= {"window_index": window.to("meta"), "cu_window_seqlens": lengths}
    if hasattr(vision, "num_position_embeddings"):
        side = int(vision.num_position_embeddings**0.5)
        index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, side, align_corners=True, spatial_merge_size=merge
        )
        found |= {"interp_indices": index.to("meta"), "interp_weights": weight.to("meta")}
    return found
