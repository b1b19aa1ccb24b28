# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, the frames of a video pooled in front of the projector."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from ..dtypes import LongTensor
from ..ops.pooling import outer_taps
from ..registry import register_adapter
from ..tokens import Layout
from .frames import frame_layout, frame_pooling
from .llava_next import LlavaNextAdapter


@register_adapter("llava_next_video")
class LlavaNextVideoAdapter(LlavaNextAdapter):
    """``LlavaNextVideoForConditionalGeneration`` with any text model that has LLaMA's layer structure.

    A video's tokens are those of its frames, one after the other, without newlines. A frame's patches are pooled to
    fewer rows before they are projected, so methods choose among pooled rows; a score that the tower gives to patches
    is averaged over the square that makes up a row, also where the model takes the maximum or a convolution.
    """

    doors: ClassVar[dict[str, str]] = {"image": "get_image_features", "video": "get_video_features"}

    def video_geometry(self, given: dict[str, Any]) -> Layout:
        videos, frames = given["pixel_values_videos"].shape[:2]
        side, stride = self._side, self.model.config.spatial_pool_stride
        pooled = side // stride
        line = _squares(pooled, stride)
        pooling = frame_pooling(
            videos * frames, side**2, outer_taps(line, line, side), given["pixel_values_videos"].device,
            behind_projector=False,
        )  # fmt: skip
        return frame_layout(videos, frames, pooling, (pooled, pooled))


def _squares(pooled: int, stride: int) -> tuple[LongTensor, torch.Tensor]:
    """[pooled, stride] places on a line that make up each pooled one, all of one weight."""
    places = torch.arange(pooled)[:, None] * stride + torch.arange(stride)
    return places, torch.full(places.shape, 1.0 / stride)
