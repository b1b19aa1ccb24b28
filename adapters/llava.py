# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: one square view per image, CLIP (or SigLIP) tower, two-layer projector."""

from __future__ import annotations

from typing import Any

from ..registry import register_adapter
from ..tokens import Layout
from .base import Adapter
from .raster import raster_layout


@register_adapter("llava")
class LlavaAdapter(Adapter):
    """``LlavaForConditionalGeneration`` with any text model that has LLaMA's layer structure."""

    plain_views = True

    def geometry(self, given: dict[str, Any]) -> Layout:
        pixels, config = given["pixel_values"], self.tower.config
        side = config.image_size // config.patch_size
        return raster_layout(len(pixels), self.token_grid((side, side)), pixels.device)

    def check_method(self, method) -> None:
        super().check_method(method)
        strategy = self.model.config.vision_feature_select_strategy
        if not self.has_cls:
            if strategy == "default":
                raise ValueError(
                    "This LLaVA cuts off its first patch (vision_feature_select_strategy='default', but its tower has no "
                    "CLS token); 'full' is right for it."
                )
        elif strategy != "default":
            raise ValueError(
                "This LLaVA feeds the CLS token to the language model (vision_feature_select_strategy='full'), which "
                "compression does not handle; 'default' works."
            )
