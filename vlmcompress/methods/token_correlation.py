# SPDX-License-Identifier: Apache-2.0
"""Token-level correlation: every sub-image of a document keeps as many tokens as it has patches that do not repeat.

Zhang et al., "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding",
arXiv 2407.14439.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.correlation import (
    SAMPLERS,
    draw,
    fill_scores,
    guarded,
    merge_dropped,
    outliers,
    repetition,
    sub_images,
)
from ..ops.scores import negative_cosine, received_attention
from ..ops.select import largest_remainder
from ..registry import register_method
from ..tokens import Layout
from ..views import EntryTokens, Selection, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@register_method("token-correlation")
@dataclass(frozen=True)
class TokenCorrelation(Method):
    """Drop what repeats in the crops of a page; the page itself says how much that is.

    A patch is redundant when its key in a low vision layer has a cosine above ``tau_sim`` with more than ``tau_num``
    others of its sub-image. A crop of N tokens, R of them redundant, keeps N - R tokens that are drawn with the CLS
    attention of that layer as probabilities, together with the outliers of the CLS attention of a deep layer. The
    thumbnail passes untouched, as do newlines.

    No code was published and most numbers of the paper could not be read: the idea and the two branches are the
    authors', every default here is ours, and each open choice is an option. Padding that a tiled model cuts off takes
    no part. A view that is its image's only one counts as a crop. Where the projector joins or pools patches, a token
    is redundant when all of its patches are (more than half of what it pools), and its attention is their sum. Views
    of native resolution are cut into virtual sub-images; keys are taken before any rotary embedding there. Towers
    without a CLS token take another signal in its place, which is a variant of ours.

    Args:
        keep: None lets the page decide. An int (tokens per image, thumbnail and newlines counted) or a float (share of
            them) is met exactly, an extension of ours: crops share what the thumbnail leaves in proportion to their
            density, outliers go first, then the largest low-layer attention.
        tau_sim: cosine above which two patches count as alike.
        tau_num: how many others a patch may be like; a float is a share of its sub-image's patches, rounded down.
        low: vision layer (0-based) of keys and sampling attention.
        deep: vision layer of the outliers; None is the one that makes the projector's features.
        iqr_factor: interquartile ranges above the third quartile at which an outlier begins.
        ignore_flat: a deep attention without spread has no outliers.
        sampler: "gumbel" draws without replacement, "replacement" with, "topk" takes the most attended.
        exclude_redundant: the local branch takes exactly the tokens that are not redundant; nothing is drawn.
        aggregate: "union" keeps the tokens of both branches as they are; "merge" lets every other token join its most
            similar one of them, weighted by deep attention.
        key_heads: keys of all heads "concat"-enated, or their "mean".
        min_tokens: what a sub-image keeps at least.
        without_cls: signal of towers without a CLS token: the attention "received" from all patches, or the
            softmax of minus the "cosine" to the view's mean patch at temperature 0.1.
        side: tokens along the edge of a virtual sub-image, at most.
        seed: of the draw, which also depends on the image's own pixels and on nothing else.
    """

    keep: int | float | None = None
    tau_sim: float = 0.9
    tau_num: int | float = 0.05
    low: int = 1
    deep: int | None = None
    iqr_factor: float = 1.5
    ignore_flat: bool = False
    sampler: str = "gumbel"
    exclude_redundant: bool = False
    aggregate: str = "union"
    key_heads: str = "concat"
    min_tokens: int = 1
    without_cls: str = "received"
    side: int = 16
    seed: int = 0

    summary: ClassVar[str] = "documents: crops keep as many tokens as they have patches that do not repeat"
    paper: ClassVar[str] = "arXiv 2407.14439"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})
    #: the count is a result of the page
    fixed_budget: ClassVar[bool] = False

    def validate(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if not -1 <= self.tau_sim < 1:
            raise ValueError(f"tau_sim is a cosine, at least -1 and below 1, not {self.tau_sim}.")
        share = isinstance(self.tau_num, float)
        if isinstance(self.tau_num, bool) or not 0 <= self.tau_num <= (1 if share else float("inf")):
            raise ValueError(
                f"tau_num is a number of patches (int ≥ 0) or a share of them (float in [0, 1]), not {self.tau_num}."
            )
        if not self.iqr_factor >= 0:
            raise ValueError(f"iqr_factor is a number of interquartile ranges, at least 0, not {self.iqr_factor}.")
        for name, least in (("low", 0), ("deep", 0), ("min_tokens", 1), ("side", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is at least {least}, not {value}.")
        for name, known in (
            ("sampler", SAMPLERS), ("aggregate", ("union", "merge")), ("key_heads", ("concat", "mean")),
            ("without_cls", ("received", "cosine")),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}.")

    def check_family(self, adapter: Adapter) -> None:
        depth = adapter.feature_layer
        for name in ("low", "deep"):
            value = getattr(self, name)
            if value is not None and value > depth:
                raise ValueError(
                    f"{name}={value} is behind vision layer {depth}, whose output this model's projector takes."
                )

    # layers -----------------------------------------------------------------------------------------------------
    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        low, deep = self._attention_layers(adapter.global_layers, adapter.feature_layer)
        return {self.low, low, deep}

    def _attention_layers(self, everywhere: Collection[int], feature: int) -> tuple[int, int]:
        """Layers of both attentions: the nearest ones in which every patch sees its whole view."""
        deep = feature if self.deep is None else self.deep
        known = [layer for layer in everywhere if layer <= feature]
        low = min((layer for layer in known if layer >= self.low), default=self.low)
        return low, max((layer for layer in known if layer <= deep), default=low)

    # signals ----------------------------------------------------------------------------------------------------
    def tower(self, layer: TowerLayer, state: dict) -> None:
        low, deep = self._attention_layers(layer.global_layers, layer.feature_layer)
        for name, index in (("low", low), ("deep", deep)):
            if layer.index == index:
                state[name] = layer.per_token(self._attention(layer, state)).detach()
        if layer.index == self.low:
            self._density(layer, state)

    def _attention(self, layer: TowerLayer, state: dict) -> Tensor:
        """[V, n] fp32, positive: how much each patch is looked at; sums to at most one per view."""
        views, n, width = layer.patches.shape
        if layer.has_cls:
            state["flops"] = state.get("flops", 0) + 2 * views * n * width
            return layer.cls_row()
        if self.without_cls == "received":
            state["flops"] = state.get("flops", 0) + 2 * views * n**2 * width
            row = received_attention(layer.q, layer.k, layer.scale, layer.bias, layer.valid)
            return row if layer.valid is None else row.masked_fill(~layer.valid, 0)
        state["flops"] = state.get("flops", 0) + 4 * views * n * width
        likeness = negative_cosine(layer.patches, layer.valid) / 0.1
        return (likeness if layer.valid is None else likeness.masked_fill(~layer.valid, float("-inf"))).softmax(-1)

    def _density(self, layer: TowerLayer, state: dict) -> None:
        """Note which tokens are redundant, and the sub-image of every cell."""
        layout, group = layer.layout, layer.group
        keys = layer.k if layer.plain_k is None else layer.plain_k
        keys = keys[:, :, layer.prefix :].detach()
        keys = keys.mean(1, dtype=torch.float32) if self.key_heads == "mean" else keys.transpose(1, 2).flatten(2)
        label = self._labels(layout, layer.native)
        state["label"] = label
        pooling = layout.pooling
        if pooling is None:
            places = label[..., None].expand(*label.shape, group).flatten(1)
        else:
            # a view's patches that some token pools
            used = torch.zeros(keys.shape[:2], dtype=torch.bool, device=keys.device)
            used.view(-1)[pooling.patch[pooling.weight > 0]] = True
            number = torch.arange(len(keys), device=keys.device)[:, None]
            places = torch.where(used & ~self._untouched(layout)[:, None], number, -1)
        index, valid = sub_images(places.flatten())
        redundant = repetition(keys.flatten(0, 1)[index], valid, self.tau_sim, self.tau_num)[1]
        state["flops"] = state.get("flops", 0) + 2 * index.numel() * index.shape[1] * keys.shape[-1]
        share = torch.zeros(places.numel(), device=keys.device)
        share[index[valid]] = redundant[valid].float()
        share = layer.per_token(share.view(keys.shape[:2]))
        state["redundant"] = share > 0.5 if pooling is not None else share == group
        if self.aggregate == "merge":
            state["keys"] = keys.unflatten(1, (-1, group)).flatten(2) if pooling is None else pooling(keys)

    @staticmethod
    def _untouched(layout: Layout) -> Tensor:
        """[V] bool: thumbnails of images that have crops."""
        if layout.thumbnail is None:
            return torch.zeros_like(layout.view_image, dtype=torch.bool)
        views = torch.bincount(layout.view_image, minlength=len(layout))
        return layout.thumbnail & (views[layout.view_image] > 1)

    def _labels(self, layout: Layout, native: bool) -> LongTensor:
        """[V, N] number of the sub-image of every cell, -1 for padding and thumbnails."""
        present = layout.to_views(layout.patch, fill=False) & ~self._untouched(layout)[:, None]
        view = torch.arange(len(present), device=present.device)[:, None]
        if not native:
            return torch.where(present, view, -1)
        cols = torch.tensor([w for _, w in layout.grid], device=present.device)[layout.view_image, None]
        rows = torch.tensor(layout.view_sizes, device=present.device)[:, None] // cols
        high, wide = ((length + self.side - 1) // self.side for length in (rows, cols))
        cell = torch.arange(present.shape[1], device=present.device)
        part = (cell // cols) * high // rows * wide + (cell % cols) * wide // cols
        return torch.where(present, view * int((high * wide).max()) + part, -1)

    # choice -----------------------------------------------------------------------------------------------------
    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        layout = tokens.layout
        label, low, deep, redundant = (state.pop(name) for name in ("label", "low", "deep", "redundant"))
        index, valid = sub_images(label.flatten())
        low_part, deep_part, redundant_part = (x.flatten()[index] for x in (low, deep, redundant))
        outlier = outliers(deep_part, valid, self.iqr_factor, self.ignore_flat)
        fill = fill_scores(outlier, deep_part, low_part, valid)
        state["scores"] = tokens.of_views(_back(fill, index, valid, label, float("-inf")), fill=float("-inf"))
        fresh = valid & ~redundant_part
        local = fresh.sum(1)
        if self.keep is not None:
            counts = self._counts(layout, label, index, local, valid)
            if counts is None:
                return None
            rank = fill.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
            keep = rank < torch.tensor(counts, device=rank.device)[:, None]
        else:
            if self.exclude_redundant:
                drawn = fresh
            else:
                noise = None if self.sampler == "topk" else self.noise(tokens).flatten()[index]
                drawn = draw(low_part, local, valid, noise, self.sampler)
            keep = guarded(outlier | drawn, low_part, valid, self.min_tokens)
        kept = _back(keep, index, valid, label, False)
        untouched = layout.valid & tokens.of_views(label < 0, fill=True)
        selection = Selection.from_mask(layout, tokens.of_views(kept, fill=False) | untouched)
        if self.aggregate == "merge" and selection.counts != layout.n:
            self._merge(tokens, state, selection, (index, valid, keep, deep_part, label))
        return selection

    def noise(self, tokens: EntryTokens) -> Tensor:
        """[V, N] uniform noise of the draw, the same for an image whatever stands beside it."""
        return tokens.layout.to_views(tokens.noise(self.seed))

    def _counts(
        self, layout: Layout, label: LongTensor, index: LongTensor, local: LongTensor, valid: Tensor
    ) -> list[int] | None:
        """Tokens that each sub-image keeps of a fixed budget; None where every image keeps all."""
        assert self.keep is not None
        sizes, fresh = valid.sum(1).tolist(), local.tolist()
        owner = layout.view_image[index[:, 0] // label.shape[1]].tolist()
        budgets = [tokens_to_keep(self.keep, n) for n in layout.n]
        if budgets == layout.n:
            return None
        counts: list[int] = []
        for image, budget in enumerate(budgets):
            mine = [part for part, i in enumerate(owner) if i == image]
            caps = [sizes[part] for part in mine]
            left = budget - (layout.n[image] - sum(caps))
            if left < min(1, sum(caps)) or left < 0:
                raise ValueError(
                    f"{budget} tokens leave no room for a crop's beside the {layout.n[image] - sum(caps)} of thumbnail and "
                    "newlines, which 'token-correlation' never drops; keep more."
                )
            counts += largest_remainder([fresh[part] / sizes[part] for part in mine], left, caps)
        return counts

    def _merge(self, tokens: EntryTokens, state: dict, selection: Selection, parts: tuple) -> None:
        """Give ``selection`` the merged rows of the projector's input, and say which token went where."""
        index, valid, keep, weight, label = parts
        layout, keys, rows = tokens.layout, state.pop("keys"), tokens.rows.flatten(0, 1)
        merged, owner = merge_dropped(rows[index], keys.flatten(0, 1)[index], weight, keep, valid)
        state["flops"] += 2 * index.numel() * index.shape[1] * keys.shape[-1]
        into = torch.arange(len(rows), device=rows.device)
        into[index[valid]] = index.gather(1, owner)[valid]
        rows = rows.index_put((index[valid],), merged[valid])
        selection.features = tokens.of_views(rows.view_as(tokens.rows)).gather(
            1, selection.keep[..., None].expand(-1, -1, rows.shape[-1])
        )
        number = torch.arange(layout.cell.shape[1], device=rows.device).expand_as(layout.cell)
        target = layout.to_views(number).flatten()[into].view_as(label)
        target = torch.where(layout.patch, tokens.of_views(target), number)
        selection.owner = selection.places(layout.cell.shape[1]).gather(1, target).masked_fill(~layout.valid, -1)


def _back(values: Tensor, index: LongTensor, valid: Tensor, label: LongTensor, fill: float | bool) -> Tensor:
    """Values per entry of the sub-images, [S, n], as a table of views and cells, [V, N]; ``fill`` elsewhere."""
    table = values.new_full((label.numel(),), fill)
    table[index[valid]] = values[valid]
    return table.view(label.shape)
