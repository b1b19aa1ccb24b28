# SPDX-License-Identifier: Apache-2.0
"""SigLIP of transformers: the pair, its tower alone, and the classifier on top of it."""

from __future__ import annotations

from torch import nn

from ..registry import register_encoder
from .encoder import EncoderAdapter, is_tower


@register_encoder("siglip")
class SiglipAdapter(EncoderAdapter):
    """``SiglipModel``, ``SiglipVisionModel``, ``SiglipForImageClassification``: no CLS token, a pooling head."""

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        return is_tower(model, ("siglip", "siglip_vision_model"))
