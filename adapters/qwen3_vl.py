# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: features of several vision layers are added behind the first decoder layers (DeepStack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..dtypes import LongTensor
from ..registry import register_adapter
from .qwen import QwenVLAdapter


@register_adapter("qwen3_vl")
class Qwen3VLAdapter(QwenVLAdapter):
    """``Qwen3VLForConditionalGeneration``.

    The DeepStack features of a token stay and leave with it. They are made in the tower, before an ENTRY method has
    chosen, so those of all patches that the tower holds are computed. Patches can leave with their whole token only:
    the mergers of different layers must join the same ones.
    """

    whole_tokens = True

    @property
    def side_projectors(self) -> Sequence[nn.Module]:
        return self.tower.deepstack_merger_list

    def follow(self, kwargs: dict[str, Any], index: LongTensor) -> None:
        taken = self.take_injected(kwargs)
        if taken is None:
            return
        mask, features = taken
        number = (mask.flatten().cumsum(0) - 1).view_as(mask).gather(1, index)
        kwargs["visual_pos_masks"] = here = mask.gather(1, index)
        kwargs["deepstack_visual_embeds"] = [feature[number[here]] for feature in features]

    def take_injected(self, kwargs: dict[str, Any]) -> tuple[Tensor, list[Tensor]] | None:
        mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if mask is None or not features:
            return None
        kwargs["visual_pos_masks"] = kwargs["deepstack_visual_embeds"] = None
        return mask, features
