# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: SigLIP, one Linear, a Gemma that reads image and question in both directions."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..compat import cache_of
from ..method import Stage
from ..registry import register_adapter
from ..tokens import Frame, Layout
from .base import Adapter
from .prefix import kept_blocks, mask_arguments
from .raster import raster_layout

_CAUSAL_ONLY = (
    "it acts inside the language model, whose prompt is not causal: its tokens see each other in both directions"
)


@register_adapter("paligemma")
class PaliGemmaAdapter(Adapter):
    """``PaliGemmaForConditionalGeneration``, both generations; the tower has no CLS token, the first position is 1.

    Where ``token_type_ids`` are 0 (image and question, as the processor makes them) all tokens see each other. What is
    left of the image goes on doing so: the masks are built once more for the sequence that enters.
    """

    refused: ClassVar[dict[Stage, str]] = {Stage.PREFILL: _CAUSAL_ONLY, Stage.CACHE: _CAUSAL_ONLY}

    @property
    def feature_layer(self) -> int:
        return len(self.tower_layers) - 1

    def geometry(self, given: dict[str, Any]) -> Layout:
        pixels, config = given["pixel_values"], self.tower.config
        side = config.image_size // config.patch_size
        return raster_layout(len(pixels), (side, side), pixels.device)

    def caller_mask(self, kwargs: dict[str, Any], given: dict[str, Any]) -> Tensor | None:
        return given.get("attention_mask")

    def language_mask(
        self, mask: Tensor | None, kwargs: dict[str, Any], frame: Frame, given: dict[str, Any]
    ) -> Tensor | dict[str, Tensor] | None:
        types, cache, blocks = given.get("token_type_ids"), cache_of(kwargs), None
        # as the stock model decides: the prompt's prefix, not what is decoded behind it
        first = cache is None or not cache.is_initialized or given.get("pixel_values") is not None
        if types is not None and first:
            blocks = kept_blocks(torch.where(types == 0, 0, -1), kwargs, given, frame)

        def built(build) -> Tensor | None:
            return build(**mask_arguments(build, self.text_config, mask, kwargs, blocks))

        if getattr(self.text_config, "sliding_window", None) is None:
            return built(create_causal_mask)
        return {
            "full_attention": built(create_causal_mask),
            "sliding_attention": built(create_sliding_window_causal_mask),
        }
