# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL in vLLM, compressed where its configuration says so: images, which keep their three-dimensional positions.

The positions of what was kept reach the engine's runner through the hook that vLLM has for pruned videos; that hook's own
arithmetic is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.fusion.mm_input_norm import build_mm_input_norm
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext, PromptReplacement, PromptUpdate

from .mrope import placed, split_places, text_positions, with_places
from .vision import CompressedVision, counter_of, settings_of


class CountedByGrid:
    """Mixin in front of a processing info: images only."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}

    def count(self, grid: Sequence[int]) -> int:
        """Tokens that are kept of an image of ``grid`` (t, h, w) patches."""
        counter = counter_of(self.get_hf_config())
        assert counter is not None
        return counter(*map(int, grid))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}


class CompressedQwen25VLInfo(CountedByGrid, Qwen2_5_VLProcessingInfo):
    """Counts what the method keeps."""


class CountedPlaceholders:
    """Mixin in front of a processor: as many placeholders as the method keeps."""

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptUpdate]:
        stock = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if not isinstance(self.info, CountedByGrid):
            return stock
        token = self.info.get_hf_config().image_token_id

        def replacement(index: int) -> list[int]:
            image = out_mm_kwargs["image"][index]
            if "image_embeds" in image:
                raise ValueError("This server compresses images itself; send pixels instead of embeddings.")
            grid = image["image_grid_thw"].data
            return [token] * self.info.count(grid.tolist())

        return [PromptReplacement(modality="image", target=[token], replacement=replacement)]


class CompressedQwen25VLProcessor(CountedPlaceholders, Qwen2_5_VLMultiModalProcessor):
    """vLLM's own, with the placeholders that the method keeps."""


class CompressedPositions(CompressedVision):
    """Mixin in front of a model class of vLLM with M-RoPE: positions of what was kept."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        multimodal = vllm_config.model_config.multimodal_config
        if settings_of(vllm_config.model_config.hf_config) and multimodal.get_limit_per_prompt("image"):
            # the runner asks a model for changed positions when it prunes; videos, which this is for, are not let in
            multimodal.video_pruning_rate = 0.5
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if self.encoder is not None:
            # pixels may come as the processor has cut them, to be normalised here
            self.input_norm = build_mm_input_norm(vllm_config.model_config)

    def _process_image_input(self, image_input):
        if self.encoder is None:
            return super()._process_image_input(image_input)
        pixels = self.input_norm(image_input["pixel_values"], self.encoder.model.dtype)
        given = {"pixel_values": pixels, "image_grid_thw": image_input["image_grid_thw"]}
        tokens, layout, selection = self.encoder.choose(given)
        return tuple(self._with_places(tokens, layout, selection))

    @staticmethod
    def _with_places(tokens: list[Tensor], layout, selection) -> list[Tensor]:
        found = []
        for index, rows in enumerate(tokens):
            place = torch.stack([torch.zeros_like(layout.row), layout.row, layout.col], dim=-1)[index]
            kept = place[: layout.n[index]] if selection is None else place[selection.keep[index, : len(rows)]]
            found.append(with_places(rows, kept))
        return found

    def _postprocess_image_embeds_evs(self, image_embeds_split, image_input):
        if self.encoder is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        return image_embeds_split

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if self.encoder is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        merge, images = self.config.vision_config.spatial_merge_size, []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            _, height, width = feature.data["image_grid_thw"].data.tolist()
            place = feature.mm_position
            images.append((place.offset, place.length, max(height, width) // merge))
        return text_positions(len(input_tokens), images)

    def recompute_mrope_positions(self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens):
        if self.encoder is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        parts = [split_places(embedding) for embedding in multimodal_embeddings]
        positions = placed(
            mrope_positions, ids == self.config.image_token_id, num_computed_tokens, [place for _, place in parts]
        )
        delta = int(positions.max()) + 1 - len(ids)
        return [embedding for embedding, _ in parts], positions, delta


def build_info(ctx: InputProcessingContext) -> Qwen2_5_VLProcessingInfo:
    """vLLM's own processing info, or ours. Raises ``ValueError`` for settings that cannot be served."""
    compressed = counter_of(ctx.get_hf_config()) is not None
    return (CompressedQwen25VLInfo if compressed else Qwen2_5_VLProcessingInfo)(ctx)


@MULTIMODAL_REGISTRY.register_processor(
    CompressedQwen25VLProcessor, info=build_info, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class CompressedQwen25VL(CompressedPositions, Qwen2_5_VLForConditionalGeneration):
    """vLLM's ``Qwen2_5_VLForConditionalGeneration``, its tokens chosen by a method of ours."""
