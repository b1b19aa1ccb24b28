# SPDX-License-Identifier: Apache-2.0
"""VTC-CLS: keep the patches that the tower's CLS token attends to, summed over its last layers.

Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs", arXiv 2412.05819.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..method import Method, Stage, check_keep
from ..ops.flowcut import mean_token
from ..ops.scores import attention_row, received_attention
from ..registry import register_method
from ..views import EntryTokens, Selection, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter

#: how the scores of two layers become one
JOIN = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


@register_method("vtc-cls")
@dataclass(frozen=True)
class VtcCls(Method):
    """Top-k patches by CLS attention, summed over the ``layers`` vision layers that end at the feature layer.

    Section 3 of the paper. Per layer the attention row of the CLS query is softmaxed over all keys (CLS included), its
    CLS column dropped without renormalising, and averaged over heads; layers are then summed. Survivors enter in raster
    order.

    Differs from the official code: the row is recomputed in fp32 from the layer's own projections instead of forcing
    eager attention; batches are scored per image (the official head mean runs over the batch); ties go to the lowest
    index. Towers without a CLS token, which the paper does not treat, take a substitute, see ``score`` (ours); of towers
    with attention windows only the layers count in which a patch sees its whole view, and where the projector joins
    patches a token's score is their mean.

    Args:
        keep: visual tokens per image, or their share.
        layers: size of the ensemble, K; the paper's tables use 3.
        score: towers without a CLS token: "received" is the attention that each patch receives, averaged over the
            queries of its view; "mean_query" the attention of the mean query, which is cheaper.
        start_layer: first layer of the ensemble instead of ``layers``, as in the official command line; a negative one
            counts from the end of the tower.
        ensemble: what becomes of the layers' scores: "sum" (ranks as the mean does), or the "max" or "min" of them, which
            the paper tried too and found worse.
        pooled: tiled images: one ranking over all views of an image instead of an even share for each.
        newlines: tiled images: keep the newline of every row of the picture that keeps a patch; newlines come on top of
            ``keep``.
    """

    keep: int | float = 64
    layers: int = 3
    score: str = "received"
    start_layer: int | None = None
    ensemble: str = "sum"
    pooled: bool = False
    newlines: bool = True

    summary: ClassVar[str] = "patches the CLS token attends to, summed over the last vision layers"
    paper: ClassVar[str] = "arXiv 2412.05819"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def validate(self) -> None:
        check_keep(self.keep)
        if isinstance(self.layers, bool) or not isinstance(self.layers, int) or self.layers < 1:
            raise ValueError(f"layers is the number of vision layers to sum, at least 1, not {self.layers!r}.")
        if self.score not in ("received", "mean_query"):
            raise ValueError(f"score is 'received' or 'mean_query', not {self.score!r}.")

        if self.ensemble not in JOIN:
            raise ValueError(f"ensemble is one of {', '.join(JOIN)}, not {self.ensemble!r}.")

    def check_family(self, adapter: Adapter) -> None:
        if not self.tower_layers(adapter):
            raise ValueError(
                f"start_layer {self.start_layer} leaves no vision layer: the last one that counts here is "
                f"{max(self._counting(adapter), default=None)}."
            )

    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        counting = self._counting(adapter)
        if self.start_layer is None:
            return counting[-self.layers :]
        start = self.start_layer if self.start_layer >= 0 else len(adapter.tower_layers) + self.start_layer
        return [layer for layer in counting if layer >= start]

    @staticmethod
    def _counting(adapter: Adapter) -> list[int]:
        return [layer for layer in adapter.global_layers if layer <= adapter.feature_layer]

    def tower(self, layer: TowerLayer, state: dict) -> None:
        if layer.has_cls:
            row = layer.cls_row()
            work = 4 * layer.n * layer.q.shape[1] * layer.q.shape[-1] * len(row)
        elif self.score == "mean_query":
            row = attention_row(mean_token(layer.q, layer.valid), layer.k, layer.scale, layer.bias).mean(1)
            work = 4 * layer.q.numel()
        else:
            row = received_attention(layer.q, layer.k, layer.scale, layer.bias, layer.valid)
            work = 2 * layer.n**2 * layer.q.shape[1] * layer.q.shape[-1] * len(row)
        row = layer.per_token(row) / layer.group
        state["joined"] = row if "joined" not in state else JOIN[self.ensemble](state["joined"], row)
        state["flops"] = state.get("flops", 0) + work

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        state["scores"] = tokens.of_views(state.pop("joined"), fill=float("-inf"))
        return tokens.select(state["scores"], self.keep, pooled=self.pooled, newlines=self.newlines)
