# SPDX-License-Identifier: Apache-2.0
"""FlowCut: drop patches between vision layers, more of them where the CLS attention is more concentrated.

Tong et al., "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", NeurIPS 2025,
arXiv 2505.19536.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.flowcut import cut_sizes, entropy_ratio, flow_score, mean_token, shares, top_blocks, value_magnitude
from ..ops.scores import attention_row
from ..ops.select import top_mask
from ..registry import register_method
from ..tokens import Layout
from ..views import Cut, EntryTokens, PrefillLayer, Selection, TowerEdit, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@register_method("flowcut")
@dataclass(frozen=True)
class FlowCut(Method):
    """A running score of every vision layer cuts patches behind every second one, down to the budget at the last cut.

    The score of a layer is (CLS attention + similarity of the values to the CLS value) × value magnitude; half of it and
    half of the running score are carried on. The number of patches to drop follows from the entropy of the CLS
    attention (sections 4.2 and 4.3 of the paper). The last cut lies just before the layer whose output is used.

    Tiled images and towers without a CLS token stop at about twice the budget, and a second cut, behind decoder layer
    ``llm_layer``, goes down to it by the same score with the last prompt token in the place of CLS.

    Where a model pools patches before they become tokens (frames of a video, a picture that is resized), nothing is cut
    in the tower: the pooled score of its last layer chooses among the tokens, down to the same number (ours).

    Towers without a CLS token take the mean query in its place and run through to their last layer. Where the projector
    joins blocks of patches to tokens, ``variant`` decides what becomes of the blocks. Where some layers attend inside
    windows (Qwen2.5-VL, for which nothing was released), every layer scores as ever, but only those in which a patch
    sees its whole view cut (ours).

    Differs from the official code: scores are fp32 and read off the layer's own projections; ties go to the lowest
    index; images of a batch do not share the number of patches to drop (the crops of one image do, as published) unless
    ``official_coupling``; several images of a prompt are ranked one by one; a budget that all tokens fit in changes
    nothing.

    Args:
        keep: visual tokens per image, or their share; for tiled images half of it per crop, at least one, goes on from
            the tower.
        history: weight of the running score against the new one.
        every: prune behind every so manieth vision layer, counted back from the last cut.
        first_prune_layer: vision layers (0-based) before it only score. 0 is the paper; later work by one of its
            authors finds skipping shallow cuts better.
        llm_layer: decoder layer behind which the second cut lies where there is one; None leaves it out, and the tower
            then goes down to the budget itself (needed to compose FlowCut with a method that acts between decoder
            layers).
        official_coupling: all images of a batch drop the same number of patches at every cut, the largest of them, as
            in the released code.
        pooled: in the second cut, several images of a prompt share one budget and are ranked together.
        variant: towers without a CLS token only. "official" is the released code: no similarity term, and single patches
            are kept, so that the projector joins patches of different blocks and the resulting tokens take the first
            positions of their image; towers whose patches only leave as whole tokens (attention windows, DeepStack)
            cannot take it. "aligned" (ours): the similarity of the values to the mean value counts as in the paper,
            whole blocks are kept by the sum of their patches' scores, and every token keeps its own position. None:
            "official" where it can work, else "aligned".
    """

    keep: int | float = 64
    history: float = 0.5
    every: int = 2
    first_prune_layer: int = 0
    llm_layer: int | None = 1
    official_coupling: bool = False
    pooled: bool = False
    variant: str | None = None

    summary: ClassVar[str] = "progressive cuts inside the vision tower, their size by attention entropy"
    paper: ClassVar[str] = "arXiv 2505.19536"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER, Stage.PREFILL})
    query_aware: ClassVar[bool] = True
    joins_patches: ClassVar[bool] = True

    def validate(self) -> None:
        check_keep(self.keep)
        if not 0.0 <= self.history <= 1.0:
            raise ValueError(f"history is a weight between 0 and 1, not {self.history!r}.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every is a number of vision layers, at least 1, not {self.every!r}.")
        if self.first_prune_layer < 0:
            raise ValueError(f"first_prune_layer is a vision layer counted from 0, not {self.first_prune_layer!r}.")
        if self.variant not in (None, "official", "aligned"):
            raise ValueError(f"variant is 'official', 'aligned' or None, not {self.variant!r}.")
        if self.llm_layer is None:
            object.__setattr__(self, "stages", frozenset({Stage.TOWER}))
        elif self.llm_layer < 0:
            raise ValueError(f"llm_layer is a decoder layer counted from 0, or None, not {self.llm_layer!r}.")

    def check_family(self, adapter: Adapter) -> None:
        if self.variant == "official" and adapter.whole_tokens:
            raise ValueError(
                "variant='official' lets single patches leave, and this tower's patches only leave as whole tokens; use "
                "variant='aligned'."
            )
        last = self._last_cut(adapter)
        if last < 0:
            raise ValueError("'flowcut' needs a vision tower with a layer in front of the one whose output is used.")
        shallow = min(adapter.feature_layers, default=last)
        if shallow < last:
            raise ValueError(
                f"'flowcut' drops patches up to layer {last}, and this model feeds the output of vision layer {shallow} "
                "too, whose patches would not fit."
            )
        if self.first_prune_layer > last:
            raise ValueError(
                f"first_prune_layer {self.first_prune_layer} lies behind layer {last}, the last one that may be cut."
            )
        depth = len(adapter.decoder_layers)
        if self._cuts_inside(adapter) and self.llm_layer >= depth - 1:
            raise ValueError(
                f"llm_layer {self.llm_layer} leaves nothing to save: this language model has {depth} layers."
            )

    @staticmethod
    def _last_cut(tower: Adapter | TowerLayer) -> int:
        """Layer behind which the last cut lies: with a CLS token the feature layer itself still runs on the budget."""
        last = tower.feature_layer - 1 if tower.has_cls else tower.feature_layer
        return max((layer for layer in tower.global_layers if layer <= last), default=-1)

    def _whole_blocks(self, layer: TowerLayer) -> bool:
        if layer.has_cls:
            return True  # no released code joins the patches of such a tower
        return layer.whole_tokens if self.variant is None else self.variant == "aligned"

    def _cuts_inside(self, adapter: Adapter) -> bool:
        return self.llm_layer is not None and (adapter.tiled or not adapter.has_cls)

    # TOWER ------------------------------------------------------------------------------------------------------
    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        return range(self._last_cut(adapter) + 1)

    def tower(self, layer: TowerLayer, state: dict) -> TowerEdit | None:
        if layer.layout.pooling is not None:
            self._score_pooled(layer, state)
            return None
        counts: list[int] = state.setdefault("counts", [n * layer.group for n in layer.layout.view_sizes])
        targets = state.setdefault("targets", [n * layer.group for n in self._targets(layer.layout, layer.has_cls)])
        if all(n <= t for n, t in zip(counts, targets, strict=True)):
            return None
        attention, score = self._score(layer)
        running = score if "running" not in state else torch.lerp(score, state["running"], self.history)
        state["running"] = running
        state["flops"] = state.get("flops", 0) + 4 * layer.v.numel()

        left = self._last_cut(layer) - layer.index
        if left % self.every or layer.index < self.first_prune_layer or layer.in_windows:
            return None
        block = layer.group if self._whole_blocks(layer) else 1
        if left:
            new = self._shorter(attention, counts, targets, left, layer, block)
        else:
            new = [min(n, t) for n, t in zip(counts, targets, strict=True)]
        self._publish(running, layer, state)
        if new == counts:
            return None
        state["counts"] = new
        ranked = running if layer.valid is None else running.masked_fill(~layer.valid, float("-inf"))
        keep = top_blocks(ranked, new, block)
        state["running"] = running.gather(1, keep)
        leading = block < layer.group
        return TowerEdit(keep, valid=real_places(new, keep), newlines=False, leading=leading)

    def _score_pooled(self, layer: TowerLayer, state: dict) -> None:
        """The running score alone, for patches that the model pools before they become tokens."""
        if all(everything for _, everything in self._budgets(layer.layout)):
            return
        if not layer.layout.pooling.everywhere:
            raise ValueError(
                "This batch has pictures that the model resizes behind its projector and others that it does not; "
                "'flowcut' cuts these in the tower and those behind it, so run them one by one."
            )
        _, score = self._score(layer)
        state["running"] = score if "running" not in state else torch.lerp(score, state["running"], self.history)
        state["flops"] = state.get("flops", 0) + 4 * layer.v.numel()
        state["has_cls"] = layer.has_cls
        state["scores"] = layer.layout.of_views(layer.per_token(state["running"]), fill=float("-inf"))

    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        """Where patches are pooled: what the tower would otherwise have cut goes in front of the language model."""
        layout = tokens.layout
        if layout.pooling is None or all(everything for _, everything in self._budgets(layout)):
            return None
        present = tokens.view_cells()
        if layout.thumbnail is not None:
            goals = self._targets(layout, state["has_cls"])
        else:
            times = 1 if state["has_cls"] or self.llm_layer is None else 2
            goals = tokens.view_budgets(
                self.keep * times if isinstance(self.keep, int) else min(1.0, self.keep * times)
            )
        caps = present.sum(1).tolist()
        scores = layout.to_views(state["scores"], fill=float("-inf"))
        best = top_mask(scores, [min(goal, cap) for goal, cap in zip(goals, caps, strict=True)])
        return tokens.select_mask(tokens.of_views(best & present, fill=False), newlines=False)

    def _score(self, layer: TowerLayer) -> tuple[Tensor, Tensor]:
        """Attention of the global token and the score of this layer, [V, n] fp32 each."""
        patches = layer.v[:, :, layer.prefix :]
        if layer.has_cls:
            attention = layer.cls_row()
            similarity = attention_row(layer.v[:, :, 0], layer.v, 1.0, layer.bias).mean(1)[:, layer.prefix :]
            return shares(attention), flow_score(attention, similarity, value_magnitude(patches))
        attention = attention_row(mean_token(layer.q, layer.valid), layer.k, layer.scale, layer.bias).mean(1)
        similarity = None
        if self._whole_blocks(layer):
            similarity = attention_row(mean_token(patches, layer.valid), patches, layer.scale, layer.bias).mean(1)
        return attention, flow_score(attention, similarity, value_magnitude(patches))

    def _targets(self, layout: Layout, has_cls: bool) -> list[int]:
        """Tokens for which each view keeps patches in the tower."""
        owners, found = layout.view_image.tolist(), []
        budgets = self._budgets(layout)
        for image, cells in zip(owners, layout.view_sizes, strict=True):
            budget, everything = budgets[image]
            if everything:
                goal = cells
            elif layout.thumbnail is not None and self.llm_layer is not None:
                goal = budget // 2
            else:
                goal = budget * (1 if has_cls or self.llm_layer is None else 2) // owners.count(image)
            found.append(min(cells, max(1, goal)))
        return found

    def _budgets(self, layout: Layout) -> list[tuple[int, bool]]:
        """Tokens of each image, newlines not counted, and whether that is all of them."""
        return [(budget := tokens_to_keep(self.keep, n), budget == n) for n in layout.patch.sum(1).tolist()]

    def _shorter(
        self, weights: Tensor, counts: list[int], targets: list[int], left: int, layer: TowerLayer, block: int
    ) -> list[int]:
        """Patches of each view behind a cut that is not the last one; whole blocks leave."""
        n, target = (torch.tensor(x, device=weights.device) for x in (counts, targets))
        ratio = entropy_ratio(weights, n, 0.0 if layer.has_cls else 1e-7)
        drop = (cut_sizes(ratio, n, target, left) / block).tolist()
        owners = [0] * len(counts) if self.official_coupling else layer.layout.view_image.tolist()
        most = {image: max(d for d, i in zip(drop, owners, strict=True) if i == image) for image in set(owners)}
        return [min(n, max(n - block * round(most[i]), t)) for n, t, i in zip(counts, targets, owners, strict=True)]

    @staticmethod
    def _publish(running: Tensor, layer: TowerLayer, state: dict) -> None:
        """The last running score of every cell, for heat maps; dropped ones keep the one that they were dropped with."""
        if "table" not in state:
            cells = layer.layout.view_grid[0] * layer.layout.view_grid[1]
            state["table"] = running.new_zeros(len(running), cells * layer.group)
        table = state["table"]
        kept = running if layer.valid is None else torch.where(layer.valid, running, table.gather(1, layer.ids))
        state["table"] = table.scatter(1, layer.ids, kept)
        state["scores"] = layer.layout.of_views(layer.per_token(state["table"]))

    # PREFILL ----------------------------------------------------------------------------------------------------
    def cut_layers(self, adapter: Adapter) -> Collection[int]:
        return (self.llm_layer,) if self._cuts_inside(adapter) else ()

    def prefill(self, layer: PrefillLayer, state: dict) -> Cut | None:
        counts = [
            alive if everything else min(budget, alive)
            for (budget, everything), alive in zip(self._budgets(layer.layout), layer.frame.counts, strict=True)
        ]
        if counts == layer.frame.counts:
            return None
        unit = layer
        if self.pooled:
            unit = layer.together()
            budgets = dict.fromkeys(unit.layout.sample, 0)
            for sample, count in zip(layer.layout.sample, counts, strict=True):
                budgets[sample] += count
            counts = list(budgets.values())
        score = last_token_score(unit)
        state["llm_scores"] = score
        state["flops"] = state.get("flops", 0) + unit.flops + 4 * score.numel() * layer.hidden.shape[-1]
        cut = unit.keep(top_mask(score, counts), counts)
        return layer.apart(cut) if self.pooled else cut


def last_token_score(layer: PrefillLayer) -> Tensor:
    """[I, c_max] fp32 score of each image's visual tokens for the last prompt token; -inf where there is none."""
    last = layer.frame.last[:, None]
    slots, valid = layer.frame.slots()
    rows = layer.layout.batch_index

    def of_images(per_slot: Tensor) -> Tensor:
        """[B, S, ...] → [I, c_max, ...]."""
        return per_slot[rows, slots]

    # a softmax over the visual keys alone is the full one, rescaled
    attention = of_images(layer.attention(last)[:, :, 0].mT).masked_fill(~valid[..., None], 0.0)
    attention = shares(attention.mT).mean(1)
    values = layer.values().float()
    visual = of_images(values.transpose(1, 2)).transpose(1, 2)  # [I, H, c_max, d]
    bias = torch.zeros(valid.shape, device=values.device).masked_fill(~valid, float("-inf"))
    query = values.gather(2, last[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[-1]))
    similarity = attention_row(query[rows[:, 0], :, 0], visual, values.shape[-1] ** -0.5, bias).mean(1)
    return flow_score(attention, similarity, value_magnitude(visual)).masked_fill(~valid, float("-inf"))


def real_places(counts: list[int], like: LongTensor) -> Tensor | None:
    """[V, n] bool: the first ``counts[v]`` places of each row; None when every row is full."""
    if min(counts) == like.shape[1]:
        return None
    return torch.arange(like.shape[1], device=like.device) < torch.tensor(counts, device=like.device)[:, None]
