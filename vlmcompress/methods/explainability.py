# SPDX-License-Identifier: Apache-2.0
"""Explainability maps: keep the visual tokens that a small net expects to matter to the answer.

Lei et al., "Generic Token Compression in Multimodal Large Language Models from an Explainability Perspective" (version 2:
"Task-Related Token Compression …", ICLR 2026), arXiv 2506.01097.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..dtypes import LongTensor
from ..method import Method, Stage, check_keep
from ..ops.relevance import kept_of_ratio
from ..ops.select import top_mask
from ..registry import register_method
from ..relevance import RelevancePredictor, predictor_of
from ..views import Cut, PrefillLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter

#: ranks by the map itself: training-free, what the net has to beat
IDENTITY = "identity"


@register_method("explainability")
@dataclass(frozen=True)
class Explainability(Method):
    """Rank visual tokens by a predictor of their relevance to the answer, before the language model runs.

    The map that the predictor reads is the first decoder layer's attention from the text behind an image to its tokens,
    mean over heads and rows, softmax over all keys: queries of those rows and keys of all tokens are projected once more,
    nothing else of the layer runs. The predictor was trained to tell, from that map, the gradient-weighted roll-out of the
    model's own answer (:mod:`vlmcompress.relevance`); it belongs to one model, and to images or to videos.

    No official code was found; this follows descriptions of the paper. Ours where it is silent: mean over heads, shares
    rounded down, survivors renumbered on models of 1-D positions, one budget per image (``joint`` for one ranking of all
    images of a prompt), ties to the lower index.

    Args:
        keep: visual tokens per image, or their share, rounded down (the paper: 0.5 and 0.25).
        predictor: file that ``vlmcompress train explainability`` wrote; None: ``relevance/image.safetensors``, or
            ``video``, beside the model's weights; "identity": rank by the map itself.
        joint: all images of a prompt share one ranking and the sum of their budgets.
        suffix_tokens: last tokens of each prompt that belong to the chat's form and do not count as the instruction.
        protect_newline: newlines of a tiled picture do not compete and stay with the rows that keep a token.
    """

    keep: int | float = 0.5
    predictor: str | None = None
    joint: bool = False
    suffix_tokens: int = 0
    protect_newline: bool = False

    summary: ClassVar[str] = "tokens that a small net expects to matter, read off the first layer's attention"
    paper: ClassVar[str] = "arXiv 2506.01097"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})
    query_aware: ClassVar[bool] = True
    reads_first_layer: ClassVar[bool] = True

    def validate(self) -> None:
        check_keep(self.keep)
        if self.predictor is not None and not isinstance(self.predictor, str):
            if not isinstance(self.predictor, Path):
                raise ValueError(f"predictor is the name of a file or 'identity', not {self.predictor!r}.")
            object.__setattr__(self, "predictor", str(self.predictor))
        if isinstance(self.suffix_tokens, bool) or not isinstance(self.suffix_tokens, int) or self.suffix_tokens < 0:
            raise ValueError(f"suffix_tokens is a number of tokens, at least 0, not {self.suffix_tokens!r}.")

    def check_family(self, adapter: Adapter) -> None:
        self.equip(adapter)

    def equip(self, adapter: Adapter) -> dict[str, RelevancePredictor]:
        """The predictors for images and videos of this model, by kind; empty for "identity"."""
        if self.predictor == IDENTITY:
            return {}
        if self.predictor is not None:
            net = RelevancePredictor.load(self.predictor).to(adapter.model.device)
            return dict.fromkeys(adapter.doors, net)
        found = {kind: predictor_of(adapter.model, kind) for kind in adapter.doors}
        found = {kind: net for kind, net in found.items() if net is not None}
        if not found:
            raise ValueError(
                "'explainability' needs a predictor of this very model, and there is none beside its weights; train one "
                "with 'vlmcompress train explainability', name its file as predictor, or take predictor='identity'."
            )
        return found

    def arrival(self, layer: PrefillLayer, state: dict, equipment: Any) -> Cut | None:
        candidates = self.candidates(layer)
        numbers = candidates.sum(1).tolist() if self.protect_newline else list(layer.layout.n)
        counts = [min(n, self.keep) if isinstance(self.keep, int) else kept_of_ratio(self.keep, n) if n else 0
                  for n in numbers]  # fmt: skip
        if counts == numbers:
            return None
        score = self.score(self.map(layer), candidates, layer, equipment or {}, state)
        state["scores"] = layer.ranking(score)
        state["flops"] = state.get("flops", 0) + layer.flops
        chosen = self._joint(score, counts, layer) if self.joint else top_mask(score, counts)
        if self.protect_newline:
            return layer.keep(layer.layout.with_newlines(chosen) & layer.layout.valid)
        return layer.keep(chosen, None if self.joint else counts)

    def candidates(self, layer: PrefillLayer) -> Tensor:
        """[I, n_max] bool: tokens that compete."""
        return layer.layout.patch if self.protect_newline else layer.layout.valid

    def map(self, layer: PrefillLayer) -> Tensor:
        """[I, n_max] fp32: attention of the instruction to every visual token, mean over heads and rows.

        The instruction of an image is the text behind its last token; where there is none, what ``suffix_tokens`` set
        aside counts after all, and then, with a warning, the prompt's last token.
        """
        frame, layout = layer.frame, layer.layout
        rows, weights = self._rows(layer)
        slots, valid = frame.slots()
        total = torch.zeros(slots.shape, device=slots.device)
        start = 0
        for part in layer.mean_attention(rows, following=True):
            weight = weights[:, start : start + part.shape[1]]
            start += part.shape[1]
            per_slot = torch.einsum("ir,irs->is", weight, part[layout.batch_index[:, 0]])
            total += per_slot.gather(1, slots)
        mean = total / weights.sum(1, keepdim=True).clamp_min(1)
        return mean.masked_fill(~valid, 0)

    def _rows(self, layer: PrefillLayer) -> tuple[LongTensor, Tensor]:
        """Slots of the text behind a sample's first image, [B, R] (-1: padding), and which count for an image, [I, R]."""
        frame, layout = layer.frame, layer.layout
        slot = torch.arange(frame.index.shape[1], device=frame.index.device)
        slots, valid = frame.slots()
        end = slots.masked_fill(~valid, -1).amax(1, keepdim=True)  # [I, 1] last token of each image
        text = frame.text[layout.batch_index[:, 0]] & (slot > end)
        if self.suffix_tokens:
            left = frame.text.flip(1).cumsum(1).flip(1)[layout.batch_index[:, 0]]
            asked = text & (left > self.suffix_tokens)
            text = torch.where(asked.any(1, keepdim=True), asked, text)
        last = slot == frame.last[layout.batch_index[:, 0]][:, None]
        told = text.any(1, keepdim=True)
        text = torch.where(told, text, last)
        wanted = torch.zeros(frame.text.shape, dtype=torch.int32, device=slot.device)
        wanted = wanted.index_add(0, layout.batch_index[:, 0], text.int()) > 0
        width, blind = torch.stack([wanted.sum(1).max(), (~told).sum()]).tolist()
        if blind:
            warnings.warn(
                "An image has no text behind it; 'explainability' ranks its tokens by the prompt's last token, which is no "
                "question. Put the question behind the image.",
                stacklevel=2,
            )
        order = wanted.to(torch.uint8).argsort(dim=1, stable=True)[:, len(slot) - width :]
        real = wanted.gather(1, order)
        mine = text.gather(1, order[layout.batch_index[:, 0]]) & real[layout.batch_index[:, 0]]
        return order.masked_fill(~real, -1), mine.float()

    def score(
        self, maps: Tensor, candidates: Tensor, layer: PrefillLayer, nets: dict[str, RelevancePredictor], state: dict
    ) -> Tensor:
        """[I, n_max] fp32 rank of every token, minus infinity for those that do not compete.

        ``nets`` by kind of picture; empty: the map itself.
        """
        score = maps.masked_fill(~candidates, -torch.inf)
        if not nets:
            return score
        kinds = layer.layout.kind
        for kind in set(kinds):
            if kind not in nets:
                raise ValueError(f"'explainability' has no predictor for {kind}s of this model.")
            images = torch.tensor([i for i, k in enumerate(kinds) if k == kind], device=maps.device)
            found = self._predicted(nets[kind].to(maps.device), maps[images], candidates[images], images, layer)
            score = score.index_copy(0, images, found)
            state["flops"] = state.get("flops", 0) + nets[kind].flops * int(candidates[images].sum())
        return score

    def _predicted(
        self, net: RelevancePredictor, maps: Tensor, valid: Tensor, images: LongTensor, layer: PrefillLayer
    ) -> Tensor:
        """[i, n_max] logits of ``images``, whose candidates ``valid`` [i, n_max] stand closely for the net."""
        if not self.joint and not self.protect_newline:
            return net(maps, valid)
        owners = [layer.layout.sample[i] for i in images.tolist()] if self.joint else list(range(len(images)))
        rows = [[i for i, o in enumerate(owners) if o == owner] for owner in dict.fromkeys(owners)]
        lines = [maps[row][valid[row]] for row in rows]
        packed = pad_sequence(lines, batch_first=True)
        length = torch.tensor([len(line) for line in lines], device=maps.device)
        real = torch.arange(packed.shape[1], device=maps.device) < length[:, None]
        logits = net(packed, real)
        table = maps.new_full(maps.shape, -torch.inf)
        for row, line, n in zip(rows, logits, length.tolist(), strict=True):
            block = table[row]
            block[valid[row]] = line[:n]
            table[row] = block
        return table

    @staticmethod
    def _joint(score: Tensor, counts: list[int], layer: PrefillLayer) -> Tensor:
        """[I, n_max] bool: the best of all images of each sample, as many as their budgets make together."""
        chosen = torch.zeros_like(score, dtype=torch.bool)
        for sample in set(layer.layout.sample):
            row = [i for i, s in enumerate(layer.layout.sample) if s == sample]
            mask = top_mask(score[row].flatten()[None], [sum(counts[i] for i in row)])
            chosen[row] = mask.view(len(row), -1)
        return chosen
