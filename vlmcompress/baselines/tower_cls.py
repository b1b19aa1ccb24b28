# SPDX-License-Identifier: Apache-2.0
"""One plain cut between two vision layers, by the CLS token's attention in the first of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..method import Method, Stage, check_keep
from ..ops.select import top_indices
from ..registry import register_method
from ..views import TowerEdit, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@register_method("tower-cls")
@dataclass(frozen=True)
class TowerCls(Method):
    """Drop patches behind one vision layer; the later layers, the projector and the language model never see them.

    Where the projector joins several patches to a token they leave together, ranked by their sum.

    Args:
        keep: visual tokens per image, or their share.
        layer: vision layer (0-based) behind which to cut; None: the middle of the tower.
    """

    keep: int | float = 64
    layer: int | None = None

    summary: ClassVar[str] = "one cut inside the vision tower by CLS attention"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})
    joins_patches: ClassVar[bool] = True

    def validate(self) -> None:
        check_keep(self.keep)

    def check_family(self, adapter: Adapter) -> None:
        if not adapter.has_cls:
            raise ValueError("'tower-cls' ranks patches by the CLS token, which this vision tower does not have.")
        if not 0 <= self._layer(adapter) < adapter.feature_layer:
            raise ValueError(f"layer lies between 0 and {adapter.feature_layer - 1} in this tower, not {self.layer}.")

    def _layer(self, adapter: Adapter) -> int:
        return adapter.feature_layer // 2 if self.layer is None else self.layer

    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        return (self._layer(adapter),)

    def tower(self, layer: TowerLayer, state: dict) -> TowerEdit | None:
        counts = layer.budgets(self.keep)
        if min(counts) >= layer.n // layer.group:
            return None
        row = layer.cls_row()
        state["flops"] = 4 * row.numel() * layer.hidden.shape[-1]
        tokens = top_indices(layer.per_token(row), counts)
        place = torch.arange(layer.group, device=tokens.device)
        keep = (tokens[..., None] * layer.group + place).flatten(1)
        if min(counts) == tokens.shape[1]:
            return TowerEdit(keep)
        # images of more crops give each of them less
        number = torch.tensor(counts, device=keep.device)[:, None] * layer.group
        return TowerEdit(keep, valid=torch.arange(keep.shape[1], device=keep.device) < number)
