# SPDX-License-Identifier: Apache-2.0
"""CLIP of transformers: the pair, its tower alone (with or without projection), and the classifier on top of it."""

from __future__ import annotations

from torch import nn

from ..registry import register_encoder
from .encoder import EncoderAdapter, is_tower


@register_encoder("clip")
class ClipAdapter(EncoderAdapter):
    """``CLIPModel``, ``CLIPVisionModel``, ``CLIPVisionModelWithProjection``, ``CLIPForImageClassification``."""

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        return is_tower(model, ("clip", "clip_vision_model"))
