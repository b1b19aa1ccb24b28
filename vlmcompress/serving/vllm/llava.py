# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 in vLLM, compressed where its configuration says so."""

from __future__ import annotations

from transformers import LlavaConfig, PixtralVisionConfig
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaImagePixelInputs,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext

from ..settings import Settings
from .vision import RESAVED, CompressedVision, counter_of


class CompressedLlavaInfo(LlavaProcessingInfo):
    """Counts what the method keeps."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        counter = counter_of(self.get_hf_config())
        assert counter is not None
        return counter()


def build_info(ctx: InputProcessingContext) -> BaseLlavaProcessingInfo:
    """vLLM's own processing info, or ours. Raises ``ValueError`` for settings that cannot be served."""
    config = ctx.get_hf_config(LlavaConfig)
    if Settings.of(config) is not None and isinstance(config.vision_config, PixtralVisionConfig):
        raise ValueError("vlmcompress serves LLaVA models with a CLIP or SigLIP tower; this one has Pixtral's.")
    compressed = counter_of(config) is not None
    return CompressedLlavaInfo(ctx) if compressed else _build_llava_or_pixtral_hf_info(ctx)


@MULTIMODAL_REGISTRY.register_processor(
    _build_llava_or_pixtral_hf_processor, info=build_info, dummy_inputs=LlavaDummyInputsBuilder
)
class CompressedLlava(CompressedVision, LlavaForConditionalGeneration):
    """vLLM's ``LlavaForConditionalGeneration``, its tokens chosen by a method of ours."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | RESAVED

    def _process_image_input(self, image_input):
        if self.encoder is None or not isinstance(image_input, LlavaImagePixelInputs):
            return super()._process_image_input(image_input)
        return self.encoder({"pixel_values": image_input["pixel_values"]})
