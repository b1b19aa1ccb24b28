# SPDX-License-Identifier: Apache-2.0
"""Token merging inside the vision tower. Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..method import Method, Stage, check_keep
from ..ops.merge import bipartite_merge
from ..registry import register_method
from ..views import TowerEdit, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@register_method("tome")
@dataclass(frozen=True)
class ToMe(Method):
    """Merge the most similar patches behind every vision layer up to the feature layer, down to ``keep`` per view.

    Patches are split alternately in two sets; each of the first finds its most similar partner in the second by the
    cosine of the head-averaged keys, and the closest pairs are averaged, weighted by how many patches they stand for
    (section 3 of the paper). Later attention adds the log of that size ("proportional attention").

    Differs from the paper: merging happens behind a block instead of between its attention and its MLP, since stock
    blocks have no seam there; the CLS token never merges. On tiled images padding merges like any patch, and a token
    whose representative is padding is cut off with it. Where the projector joins several patches to a token, tokens
    merge as wholes, each of their patches with the one in the same place of the other, alike by all their keys.

    Args:
        keep: visual tokens per image, or their share.
        proportional: weigh merged tokens by their size in later attention.
    """

    keep: int | float = 64
    proportional: bool = True

    summary: ClassVar[str] = "similar patches merged inside the vision tower"
    paper: ClassVar[str] = "arXiv 2210.09461"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})
    joins_patches: ClassVar[bool] = True

    def check_family(self, adapter: Adapter) -> None:
        if adapter.packed_tower:
            raise ValueError(
                "'tome' merges equally much in every view of a pass, and here every image keeps its own resolution."
            )

    def validate(self) -> None:
        check_keep(self.keep)

    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        return range(adapter.feature_layer + 1)

    def tower(self, layer: TowerLayer, state: dict) -> TowerEdit | None:
        targets = layer.budgets(self.keep)
        target = min(targets)
        if target != max(targets):
            raise ValueError(
                "'tome' merges equally much in every view of a pass, and these images are cut into different numbers of "
                "views; give keep as a share (float) or run them singly."
            )
        tokens, group = layer.n // layer.group, layer.group
        if tokens <= target:
            return None
        left = state.setdefault("left", layer.feature_layer + 1)
        state["left"] = left - 1
        size = state.get("size")
        size = torch.ones(len(layer.ids), tokens, device=layer.hidden.device) if size is None else size
        metric = layer.k[:, :, layer.prefix :].float().mean(1).unflatten(1, (tokens, group)).flatten(2)
        rows = layer.patches.unflatten(1, (tokens, group)).flatten(2)
        # an even share of what is still to go; a round can merge half of the patches at most, and the last layer goes
        # on for as many rounds as the budget still needs
        goal = tokens - min(tokens // 2, -(-(tokens - target) // left)) if left > 1 else target
        keep = owner = None
        while rows.shape[1] > goal:
            amount = min(rows.shape[1] // 2, rows.shape[1] - goal)
            state["flops"] = state.get("flops", 0) + metric.numel() * rows.shape[1]
            kept, place, rows, size = bipartite_merge(metric, rows, size, amount)
            metric = metric.gather(1, kept[..., None].expand(-1, -1, metric.shape[-1]))
            keep = kept if keep is None else keep.gather(1, kept)
            owner = place if owner is None else place.gather(1, owner)
        assert keep is not None and owner is not None
        state["size"] = size
        place = torch.arange(group, device=keep.device)
        keep, owner = ((x[..., None] * group + place).flatten(1) for x in (keep, owner))
        bias = size.log().repeat_interleave(group, dim=1) if self.proportional else None
        return TowerEdit(keep, hidden=rows.unflatten(2, (group, -1)).flatten(1, 2), owner=owner, bias=bias)
