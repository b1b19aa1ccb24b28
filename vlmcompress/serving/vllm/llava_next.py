# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT in vLLM, compressed where its configuration says so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlavaNextConfig
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextImagePixelInputs,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing import InputProcessingContext

from .vision import RESAVED, CompressedVision, counter_of


class CountedBySize:
    """Mixin in front of a processing info: what the method keeps of an image of that size."""

    #: vLLM's own
    stock: type[LlavaNextProcessingInfo]

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        counter = counter_of(self.get_hf_config())
        assert counter is not None
        return counter(image_height, image_width)

    def get_image_size_with_most_features(self) -> ImageSize:
        # the tower works on all views, however few tokens stay: memory is planned for the largest image
        return self.stock(self.ctx).get_image_size_with_most_features()


class CompressedLlavaNextInfo(CountedBySize, LlavaNextProcessingInfo):
    """Counts what the method keeps."""

    stock = LlavaNextProcessingInfo


def build_info(ctx: InputProcessingContext) -> LlavaNextProcessingInfo:
    """vLLM's own processing info, or ours. Raises ``ValueError`` for settings that cannot be served."""
    compressed = counter_of(ctx.get_hf_config(LlavaNextConfig)) is not None
    return (CompressedLlavaNextInfo if compressed else LlavaNextProcessingInfo)(ctx)


def tiled(pixel_values: Tensor | list[Tensor], image_sizes: Tensor) -> dict[str, Any]:
    """``pixel_values`` [images, most views, 3, H, W] and ``image_sizes`` as the model of transformers takes them."""
    if not isinstance(pixel_values, Tensor):
        pixel_values = torch.nn.utils.rnn.pad_sequence(list(pixel_values), batch_first=True)
    return {"pixel_values": pixel_values, "image_sizes": image_sizes}


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=build_info, dummy_inputs=LlavaDummyInputsBuilder
)
class CompressedLlavaNext(CompressedVision, LlavaNextForConditionalGeneration):
    """vLLM's ``LlavaNextForConditionalGeneration``, its tokens chosen by a method of ours."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | RESAVED

    def _process_image_input(self, image_input):
        if self.encoder is None or not isinstance(image_input, LlavaNextImagePixelInputs):
            return super()._process_image_input(image_input)
        return self.encoder(tiled(image_input["pixel_values"], image_input["image_sizes"]))
