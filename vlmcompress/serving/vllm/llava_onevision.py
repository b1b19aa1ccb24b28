# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision in vLLM, compressed where its configuration says so: images; videos are refused then."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LlavaOnevisionConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImagePixelInputs,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext

from .llava_next import CountedBySize, tiled
from .vision import RESAVED, CompressedVision, counter_of, images_only


class CompressedLlavaOnevisionInfo(CountedBySize, LlavaOnevisionProcessingInfo):
    """Counts what the method keeps."""

    stock = LlavaOnevisionProcessingInfo

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}


def build_info(ctx: InputProcessingContext) -> LlavaOnevisionProcessingInfo:
    """vLLM's own processing info, or ours. Raises ``ValueError`` for settings that cannot be served."""
    compressed = counter_of(ctx.get_hf_config(LlavaOnevisionConfig)) is not None
    return (CompressedLlavaOnevisionInfo if compressed else LlavaOnevisionProcessingInfo)(ctx)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionMultiModalProcessor,
    info=build_info,
    dummy_inputs=images_only(CompressedLlavaOnevisionInfo, LlavaDummyInputsBuilder, LlavaOnevisionDummyInputsBuilder),
)
class CompressedLlavaOnevision(CompressedVision, LlavaOnevisionForConditionalGeneration):
    """vLLM's ``LlavaOnevisionForConditionalGeneration``, its tokens chosen by a method of ours."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | RESAVED

    def _process_image_input(self, image_input):
        if self.encoder is None or not isinstance(image_input, LlavaOnevisionImagePixelInputs):
            return super()._process_image_input(image_input)
        given = tiled(image_input["pixel_values"], image_input["image_sizes"])
        # vLLM treats every image as the only one of its prompt, so that it can be kept for other prompts
        alone = torch.ones(len(given["image_sizes"]), dtype=torch.long)
        return self.encoder({**given, "batch_num_images": alone})
