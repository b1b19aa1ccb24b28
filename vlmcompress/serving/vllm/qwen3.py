# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL in vLLM, compressed where its configuration says so: images; what DeepStack adds to a token goes with it."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import InputProcessingContext

from .qwen import CompressedPositions, CountedByGrid, CountedPlaceholders
from .vision import counter_of


class CompressedQwen3VLInfo(CountedByGrid, Qwen3VLProcessingInfo):
    """Counts what the method keeps."""


class CompressedQwen3VLProcessor(CountedPlaceholders, Qwen3VLMultiModalProcessor):
    """vLLM's own, with the placeholders that the method keeps."""


def build_info(ctx: InputProcessingContext) -> Qwen3VLProcessingInfo:
    """vLLM's own processing info, or ours. Raises ``ValueError`` for settings that cannot be served."""
    compressed = counter_of(ctx.get_hf_config()) is not None
    return (CompressedQwen3VLInfo if compressed else Qwen3VLProcessingInfo)(ctx)


@MULTIMODAL_REGISTRY.register_processor(
    CompressedQwen3VLProcessor, info=build_info, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class CompressedQwen3VL(CompressedPositions, Qwen3VLForConditionalGeneration):
    """vLLM's ``Qwen3VLForConditionalGeneration``, its tokens chosen by a method of ours."""
