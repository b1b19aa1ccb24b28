# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL: every patch sees its whole image in all layers of the tower."""

from __future__ import annotations

from ..registry import register_adapter
from .qwen import QwenVLAdapter


@register_adapter("qwen2_vl")
class Qwen2VLAdapter(QwenVLAdapter):
    """``Qwen2VLForConditionalGeneration``."""
