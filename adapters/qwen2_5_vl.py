# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: most layers of the tower attend inside windows, and its pack goes window by window."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..dtypes import LongTensor
from ..registry import register_adapter
from .qwen import QwenVLAdapter


@register_adapter("qwen2_5_vl")
class Qwen25VLAdapter(QwenVLAdapter):
    """``Qwen2_5_VLForConditionalGeneration``.

    Windows are squares of whole tokens; the order in which the tower takes them is undone behind the merger. Patches
    can leave with their whole token only, so that every window stays one run of the pack.
    """

    whole_tokens = True

    @property
    def global_layers(self) -> Sequence[int]:
        return sorted(set(self.tower.fullatt_block_indexes) & set(range(len(self.tower_layers))))

    def windows(self, grids: list[tuple[int, int]], device: torch.device) -> LongTensor | None:
        side = self.tower.window_size // self.tower.patch_size // self.tower.spatial_merge_size
        numbers = []
        for height, width in grids:
            row, col = torch.arange(height) // side, torch.arange(width) // side
            numbers.append((row[:, None] * -(-width // side) + col).flatten())
        return torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True).to(device)
