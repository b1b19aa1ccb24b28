# SPDX-License-Identifier: Apache-2.0
"""The ledger: how far every visual token of one forward pass travelled.

:class:`VisualTokens` joins the geometry of the images (:class:`~vlmcompress.tokens.Layout`) with what compression left
alive at each decoder layer. Reports, FLOPs, KV bytes, heat maps and tests read it; nothing counts tokens a second way.
All tensors stay on the model's device until somebody reads a property.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .dtypes import LongTensor
from .tokens import NEWLINE, Frame, Layout, Selection


class ImageRecord:
    """What became of the visual tokens of one image or video."""

    def __init__(self, ledger: VisualTokens, image: int):
        self._ledger, self._image = ledger, image
        layout = ledger.layout
        self.n_original: int = layout.n[image]
        self.grid: tuple[int, int] = layout.grid[image]
        self.kind: str = layout.kind[image]

    def _table(self, name: str) -> LongTensor:
        return getattr(self._ledger.layout, name)[self._image, : self.n_original].cpu()

    @property
    def rows(self) -> LongTensor:
        """[n_original] row of each token in ``grid``."""
        return self._table("row")

    @property
    def cols(self) -> LongTensor:
        """[n_original] column of each token in ``grid`` (a newline token stands after the last column)."""
        return self._table("col")

    @property
    def views(self) -> LongTensor:
        """[n_original] crop or frame of each token, counted within this forward pass."""
        return self._table("view")

    @property
    def is_newline(self) -> Tensor:
        """[n_original] bool: tokens that no patch produced."""
        return self._table("cell") == NEWLINE

    @property
    def kept(self) -> LongTensor:
        """Sorted indices of the tokens that entered the language model."""
        return self.kept_at(0)

    def kept_at(self, layer: int) -> LongTensor:
        """Sorted indices of the tokens that decoder layer ``layer`` (0-based) processed; one fed twice is there twice."""
        frame = self._ledger.frame_at(layer)
        row = self._ledger.layout.sample[self._image]
        alive = frame.index[row][(frame.image[row] == self._image) & frame.visual[row]]
        columns = self._ledger.layout.column[self._image, : self.n_original]
        kept = torch.isin(columns, alive).nonzero()[:, 0]
        selection = self._ledger.selection
        if selection is not None and selection.copies is not None:
            real = slice(selection.counts[self._image])
            carried = torch.arange(self.n_original, device=kept.device)
            carried[selection.keep[self._image, real]] = selection.copies[self._image, real]
            kept = carried[kept].sort().values
        return kept.cpu()

    @property
    def sources(self) -> list[LongTensor]:
        """For each entry of ``kept``: the original tokens that it stands for (itself alone where nothing was merged)."""
        selection = self._ledger.selection
        if selection is None or selection.owner is None:
            return [k[None] for k in self.kept]
        order = selection.keep[self._image, : selection.counts[self._image]].cpu()
        owner = selection.owner[self._image, : self.n_original].cpu()
        return [(owner == int(place)).nonzero()[:, 0] for place in order.argsort()]

    def scores(self) -> Tensor | None:
        """[n_original] fp32 score by which the method ranked the tokens at ENTRY, if it published one."""
        scores = self._ledger.scores
        if scores is None:
            return None
        return scores[self._ledger.layout.source[self._image], : self.n_original].float().cpu()


class SampleRecord:
    """One row of the batch: its images and how many tokens of either kind it held."""

    def __init__(self, ledger: VisualTokens, row: int):
        self._ledger, self._row = ledger, row
        self.images = [ImageRecord(ledger, i) for i, s in enumerate(ledger.layout.sample) if s == row]

    @property
    def text_tokens(self) -> int:
        """Text tokens of the prompt, padding not counted."""
        return int(self._ledger.frames[0].text[self._row].sum())

    @property
    def layer_tokens(self) -> list[int]:
        """Visual tokens that each decoder layer processed."""
        return self._ledger._visual_by_layer(self._row)


@dataclass
class VisualTokens:
    """Record of one prefill: the single source of every number about visual tokens.

    ``frames`` are ordered by their first decoder layer; ``selection`` is what ENTRY chose (None: all), ``scores`` its
    published ranking. ``tower_tokens[l]``: tokens, CLS included, that vision layer l processed, summed over views;
    ``tower_views[l]`` [V]: the same for each view without its padding, None where all views are alike, and for towers
    that take views of different size in one pack ``tower_pairs[l]`` [V]: pairs of a query and a key that attend to each
    other there.
    ``positions``: position ids that entered the language model, [B, S'] or [axes, B, S'] for M-RoPE.
    ``compressor_flops``: floating-point operations that the methods themselves added, summed over the batch.
    """

    layout: Layout
    n_layers: int
    frames: list[Frame]
    selection: Selection | None = None
    scores: Tensor | None = None
    tower_tokens: list[int] = field(default_factory=list)
    tower_views: list[LongTensor | None] = field(default_factory=list)
    tower_pairs: list[LongTensor] = field(default_factory=list)
    positions: LongTensor | None = None
    compressor_flops: int = 0
    #: entries of each decoder layer's cache after the prefill, per head where heads differ; None without a cache
    cache_lengths: list[int] | None = None
    #: per decoder layer ([B], [B]): entries of visual tokens and of text after the prefill, averaged over heads; only
    #: where a method acts on the cache
    cache_modality: list[tuple[Tensor, Tensor]] | None = None

    def frame_at(self, layer: int) -> Frame:
        if not 0 <= layer < self.n_layers:
            raise ValueError(f"This model has decoder layers 0 to {self.n_layers - 1}; there is no layer {layer}.")
        return [f for f in self.frames if f.first_layer <= layer][-1]

    @property
    def samples(self) -> list[SampleRecord]:
        return [SampleRecord(self, row) for row in range(len(self.frames[0].index))]

    @property
    def layer_tokens(self) -> list[int]:
        """Visual tokens that each decoder layer processed, summed over the batch."""
        return self._visual_by_layer(slice(None))

    def _visual_by_layer(self, rows) -> list[int]:
        counts = {id(f): int(f.visual[rows].sum()) for f in self.frames}
        return [counts[id(self.frame_at(layer))] for layer in range(self.n_layers)]
