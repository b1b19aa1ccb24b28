# SPDX-License-Identifier: Apache-2.0
"""InternVL (the classes of transformers) in vLLM, compressed where its configuration says so: images, no videos then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1ImagePixelInputs,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, ImageSize
from vllm.multimodal.processing import (
    InputProcessingContext,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
    cached_encode,
)

from ..counting import runs
from .vision import CompressedVision, counter_of, images_only


class CompressedInternVLInfo(InternS1ProcessingInfo):
    """Counts what the method keeps."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_num_image_tokens(self, *, image_width, image_height, processor, mm_kwargs) -> int:
        views = processor.image_processor.get_number_of_image_patches(
            image_height, image_width, self.ctx.get_merged_mm_kwargs(mm_kwargs)
        )
        return self.count(views)

    def count(self, views: int) -> int:
        """Tokens that are kept of an image of ``views`` views."""
        counter = counter_of(self.ctx.get_hf_config())
        assert counter is not None
        return counter(int(views))

    def get_image_size_with_most_features(self) -> ImageSize:
        return InternS1ProcessingInfo(self.ctx).get_image_size_with_most_features()


class CompressedInternVLProcessor(InternS1MultiModalProcessor):
    """vLLM's own, with the placeholders that the method keeps."""

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptUpdate]:
        stock = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if not isinstance(self.info, CompressedInternVLInfo):
            return stock
        processor, tokenizer = self.info.get_hf_processor(**hf_processor_mm_kwargs), self.info.get_tokenizer()
        data = out_mm_kwargs.get_data()
        views = data["image_num_patches"].tolist() if "image_num_patches" in data else []

        def replacement(index: int):
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            ready = isinstance(images, ImageEmbeddingItems)
            n = images.get_feature_size(index) if ready else self.info.count(views[index])
            text = processor.start_image_token + processor.image_token * n + processor.end_image_token
            ids = cached_encode(tokenizer, text, add_special_tokens=False)
            return PromptUpdateDetails.select_token_id(ids, processor.image_token_id)

        return [PromptReplacement(modality="image", target=[processor.image_token_id], replacement=replacement)]


def build_info(ctx: InputProcessingContext) -> InternS1ProcessingInfo:
    """vLLM's own processing info, or ours. Raises ``ValueError`` for settings that cannot be served."""
    compressed = counter_of(ctx.get_hf_config()) is not None
    return (CompressedInternVLInfo if compressed else InternS1ProcessingInfo)(ctx)


@MULTIMODAL_REGISTRY.register_processor(
    CompressedInternVLProcessor,
    info=build_info,
    dummy_inputs=images_only(CompressedInternVLInfo, LlavaDummyInputsBuilder, InternS1DummyInputsBuilder),
)
class CompressedInternVL(CompressedVision, InternS1ForConditionalGeneration):
    """vLLM's class for InternVL of transformers, its tokens chosen by a method of ours."""

    def _process_vision_input(self, image_input):
        if self.encoder is None or not isinstance(image_input, InternS1ImagePixelInputs):
            return super()._process_vision_input(image_input)
        cells = self.encoder.model.config.image_seq_length
        lengths = [n * cells for n in image_input["num_patches"].tolist()]
        return self.encoder({"pixel_values": image_input["pixel_values"], "placeholders": runs(lengths)})
