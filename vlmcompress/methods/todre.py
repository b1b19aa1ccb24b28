# SPDX-License-Identifier: Apache-2.0
"""ToDRE: visual tokens that are spread out enter, and all of them leave late if text and image have stopped talking.

Li et al., "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv 2505.18757 (version 2;
version 1's rule by name).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..method import Method, Stage, check_keep
from ..ops.diversity import direction_pivot, diverse_order
from ..registry import register_method
from ..views import Cut, EntryTokens, PrefillLayer, Selection, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter

PIVOTS = ("cls", "farthest", "center", "random")


@register_method("todre")
@dataclass(frozen=True)
class ToDRE(Method):
    """Greedy max-sum diversity in front of the language model, one relevance check late inside it.

    ENTRY: from a pivot on, the token with the least sum of cosines to all chosen ones joins, in the space of the
    projected tokens; all crops or frames of an image compete in one choice. PREFILL: behind the probe layers the shares
    of attention from text to image and from image to text are taken; at the first probe where both are below ``tau`` all
    visual tokens of the sample leave. Survivors are renumbered at ENTRY (1-D positions) and keep their ids at the cut.

    No official code was found: this follows version 2 of the paper, its gaps filled as the page of the method says.
    Several images of one prompt are chosen from one by one (the paper: jointly), and samples of a batch decide on their
    own.

    Args:
        keep: visual tokens per image, or their share, rounded down; newlines of tiled images do not count.
        rule: "maxsum" (version 2) or "kcenter" (version 1): the least largest cosine to a chosen token.
        pivot: first token: "cls" is what the CLS token of the last vision layer attends to most (tiled images: in the
            thumbnail); "farthest" and "center" from the mean direction; "random". Towers without a CLS token take
            "farthest" for "cls".
        newlines: keep the newlines of rows that keep a patch (tiled images).
        stage2: "probe", "always" (at the first probe layer, without a look) or "never".
        tau: both shares have to be below it.
        depth: probe layers as shares of the decoder's depth, ascending.
        text_scope: text that is asked: "all", or only what comes "after" the last visual token.
        system_tokens: leading tokens of each prompt that belong to the system's turn and are not asked.
        seed: of the random pivot.
    """

    keep: int | float = 0.25
    rule: str = "maxsum"
    pivot: str = "cls"
    newlines: bool = False
    stage2: str = "probe"
    tau: float = 0.1
    depth: tuple[float, ...] = (7 / 8,)
    text_scope: str = "all"
    system_tokens: int = 0
    seed: int = 0

    summary: ClassVar[str] = "tokens that are spread out enter; all leave late when text and image stop talking"
    paper: ClassVar[str] = "arXiv 2505.18757"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER, Stage.ENTRY, Stage.PREFILL})
    query_aware: ClassVar[bool] = True
    joins_patches: ClassVar[bool] = True
    published_cut_positions: ClassVar[str] = "original"

    def validate(self) -> None:
        check_keep(self.keep)
        for name, allowed in (
            ("rule", ("maxsum", "kcenter")),
            ("pivot", PIVOTS),
            ("stage2", ("probe", "always", "never")),
            ("text_scope", ("all", "after")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}.")
        object.__setattr__(self, "depth", tuple(self.depth))  # lists come back from a saved configuration
        if not self.depth or list(self.depth) != sorted(self.depth) or not 0 < self.depth[0] <= self.depth[-1] < 1:
            raise ValueError(f"depth is shares of the decoder's depth between 0 and 1, ascending, not {self.depth}.")
        if self.tau < 0:
            raise ValueError(f"tau is a share of attention, at least 0, not {self.tau}.")
        if isinstance(self.system_tokens, bool) or not isinstance(self.system_tokens, int) or self.system_tokens < 0:
            raise ValueError(f"system_tokens is a number of tokens, at least 0, not {self.system_tokens!r}.")

    # TOWER ------------------------------------------------------------------------------------------------------
    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        return (len(adapter.tower_layers) - 1,) if self.pivot == "cls" and adapter.has_cls else ()

    def tower(self, layer: TowerLayer, state: dict) -> None:
        """Note what the CLS token attends to, per cell: of patches that are joined to one token the best."""
        row = layer.cls_row()
        state["flops"] = 2 * layer.k.numel()
        if layer.layout.pooling is None:
            cells = layer.layout.view_grid[0] * layer.layout.view_grid[1]
            table = row.new_full((len(row), cells), float("-inf"))
            state["cls"] = table.scatter_reduce(1, layer.ids // layer.group, row, "amax")

    # ENTRY ------------------------------------------------------------------------------------------------------
    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        layout = tokens.layout
        patches = layout.patch.sum(1).tolist()
        counts = [kept_of(self.keep, n) for n in patches]
        if counts == patches:
            return None
        features = tokens.projected
        first = self.first(features, layout, state)
        order = diverse_order(features, first, max(counts), rule=self.rule, candidates=layout.patch)
        state["flops"] = state.get("flops", 0) + 2 * max(counts) * features.numel()
        place = torch.arange(max(counts), device=order.device)
        taken = place < torch.tensor(counts, device=order.device)[:, None]
        # one spare column takes what a shorter image does not want
        width = features.shape[1]
        mask = torch.zeros(len(order), width + 1, dtype=torch.bool, device=order.device)
        mask = mask.scatter(1, order.masked_fill(~taken, width), True)[:, :width]
        state["scores"] = self._ranking(order, taken, width)
        return tokens.select_mask(mask, newlines=self.newlines)

    @staticmethod
    def _ranking(order: LongTensor, taken: Tensor, width: int) -> Tensor:
        """[I, n_max] for the heat map: the earlier chosen, the higher; -inf for tokens never chosen."""
        steps = torch.arange(order.shape[1], 0, -1, device=order.device).float().expand_as(order)
        table = torch.full((len(order), width + 1), float("-inf"), device=order.device)
        return table.scatter(1, order.masked_fill(~taken, width), steps)[:, :width]

    def first(self, features: Tensor, layout, state: dict) -> LongTensor:
        """[I] the pivot of every image."""
        if self.pivot == "cls" and state.get("cls") is not None:
            seen = layout.of_views(state["cls"], fill=float("-inf"))
            if layout.thumbnail is not None:
                small = layout.thumbnail[layout.view.clamp_min(0)] & layout.patch
                small = small | ~small.any(1, keepdim=True)
                seen = seen.masked_fill(~small, float("-inf"))
            return seen.argmax(1)
        if self.pivot == "random":
            picks = []
            for n in layout.patch.sum(1).tolist():  # seeded anew, so that an image has the same pivot in every batch
                picks.append(int(torch.randint(0, n, (1,), generator=torch.Generator().manual_seed(self.seed))))
            number = layout.patch.long().cumsum(1) - 1
            wanted = torch.tensor(picks, device=number.device)[:, None]
            return ((number == wanted) & layout.patch).int().argmax(1)
        return direction_pivot(features, farthest=self.pivot != "center", candidates=layout.patch)

    # PREFILL ----------------------------------------------------------------------------------------------------
    def cut_layers(self, adapter: Adapter) -> Collection[int]:
        layers = len(adapter.decoder_layers)
        probes = sorted({math.floor(share * layers + 1e-9) for share in self.depth})
        # behind the last layer there is nothing to save
        probes = [probe for probe in probes if probe < layers - 1]
        if self.stage2 == "never":
            return ()
        return probes[:1] if self.stage2 == "always" else probes

    def prefill(self, layer: PrefillLayer, state: dict) -> Cut | None:
        counts = layer.frame.counts
        if not any(counts):
            return None
        if self.stage2 == "always":
            fires = [True] * len(layer.frame.index)
        else:
            state["ratios"] = from_text, from_image = self.ratios(layer)
            state["flops"] = state.get("flops", 0) + layer.flops
            fires = ((from_text < self.tau) & (from_image < self.tau)).tolist()
        left = [0 if fires[row] else n for row, n in zip(layer.layout.sample, counts, strict=True)]
        if left == counts:
            return None
        keep = torch.tensor(left, device=layer.hidden.device)[:, None] > 0
        _, valid = layer.frame.slots()
        return layer.keep(keep.expand_as(valid), left)

    def ratios(self, layer: PrefillLayer) -> tuple[Tensor, Tensor]:
        """([B], [B]) fp32 shares of attention: of the text's that goes to the image, of the image's that goes to text.

        A sample without visual tokens or without text to ask gets infinity, so that it never fires.
        """
        frame = layer.frame
        visual, text = frame.visual, frame.text
        number = (visual | text).long().cumsum(1)
        text = text & (number > self.system_tokens)
        if self.text_scope == "after":
            slot = torch.arange(text.shape[1], device=text.device)
            text = text & (slot > torch.where(visual, slot, -1).amax(1, keepdim=True))
        undecided = ~(visual.any(1) & text.any(1))
        found = []
        for asked, about in ((text, visual), (visual, text)):
            total = torch.zeros(len(text), device=text.device)
            for part in layer.mean_attention(slots_of(asked)):
                total += (part * about[:, None]).sum((1, 2))
            found.append((total / asked.sum(1).clamp_min(1)).masked_fill(undecided, float("inf")))
        return found[0], found[1]


def kept_of(keep: int | float, n: int) -> int:
    """Budget of one image of ``n`` tokens: at least one; a share is rounded down."""
    return max(1, min(n, keep if isinstance(keep, int) else math.floor(keep * n + 1e-9)))


def slots_of(mask: Tensor) -> LongTensor:
    """[B, R] slots where ``mask`` [B, S] holds, ascending, padded with -1 in front."""
    width = max(1, int(mask.sum(1).max()))
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, mask.shape[1] - width :]
    return order.masked_fill(~mask.gather(1, order), -1)
