# SPDX-License-Identifier: Apache-2.0
"""FastV: drop, behind an early decoder layer, the visual tokens that the last prompt token attends to least.

Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764; the windowed form answers its position bias
(Wen et al., arXiv 2502.11501).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.select import largest_remainder, top_mask
from ..registry import register_method
from ..views import Cut, PrefillLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@register_method("fastv")
@dataclass(frozen=True)
class FastV(Method):
    """Keep the visual tokens with the largest attention from the last prompt token in decoder layer ``layer - 1``.

    Layers 0 … ``layer - 1`` process all tokens, so the layer-averaged count is above ``keep``.

    Args:
        keep: visual tokens per image behind the cut, or their share.
        layer: number of layers that see everything (the paper's K).
        window: side of square windows of the image that get equal budgets, or None for one global ranking.
    """

    keep: int | float = 64
    layer: int = 2
    window: int | None = None

    summary: ClassVar[str] = "least attended visual tokens leave behind decoder layer 2"
    paper: ClassVar[str] = "arXiv 2403.06764"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.PREFILL})
    query_aware: ClassVar[bool] = True
    published_positions: ClassVar[str] = "original"

    def validate(self) -> None:
        check_keep(self.keep)
        if self.layer < 1:
            raise ValueError(
                f"layer is the number of decoder layers that see every token, at least 1, not {self.layer}."
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is the side of a window in tokens, at least 1, not {self.window}.")

    def check_family(self, adapter: Adapter) -> None:
        depth = len(adapter.decoder_layers)
        if self.layer >= depth:
            raise ValueError(f"layer {self.layer} leaves nothing to save: this language model has {depth} layers.")

    def cut_layers(self, adapter: Adapter) -> Collection[int]:
        return (self.layer - 1,)

    def prefill(self, layer: PrefillLayer, state: dict) -> Cut | None:
        layout = layer.layout
        counts = [
            min(tokens_to_keep(self.keep, n), alive) for n, alive in zip(layout.n, layer.frame.counts, strict=True)
        ]
        if counts == layer.frame.counts:
            return None
        row = layer.attention(layer.frame.last[:, None])[:, :, 0].mean(1)
        state["flops"] = 2 * row.numel() * layer.hidden.shape[-1]
        scores = layer.of_images(row, fill=float("-inf"))
        if self.window is None:
            return layer.keep(top_mask(scores, counts), counts)
        return layer.keep(self._windowed(layer, scores, counts), counts)

    def _windowed(self, layer: PrefillLayer, scores: Tensor, counts: list[int]) -> Tensor:
        """Equal budgets for square windows of every image (largest remainder), top scores inside each."""
        assert self.window is not None
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        slots, valid = layer.frame.slots()
        layout = layer.layout
        for image, k in enumerate(counts):
            alive = layer.frame.counts[image]
            column = layer.frame.index[layout.sample[image]][slots[image, :alive]]
            token = torch.searchsorted(layout.column[image, : layout.n[image]].contiguous(), column)
            # a newline stands behind the last column
            row, col = layout.row[image][token], layout.col[image][token].clamp_max(layout.grid[image][1] - 1)
            across = -(-layout.grid[image][1] // self.window)
            number = (row // self.window) * across + col // self.window
            windows, sizes = number.unique(return_counts=True)
            budgets = largest_remainder([1.0] * len(windows), k, sizes.tolist())
            for which, budget in zip(windows, budgets, strict=True):
                members = (number == which).nonzero()[:, 0]
                best = scores[image, members].argsort(descending=True, stable=True)[:budget]
                chosen[image, members[best]] = True
        return chosen & valid
