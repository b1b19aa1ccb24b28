# SPDX-License-Identifier: Apache-2.0
"""Uniform choice, average pooling and a smaller image: what needs no score at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import LongTensor

from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.pool import bin_owner, pool_grid
from ..ops.select import even_indices, fit_grid
from ..registry import register_method
from ..tokens import Layout
from ..views import EntryTokens, Selection


@dataclass(frozen=True)
class _KeepOnly(Method):
    keep: int | float = 64

    def validate(self) -> None:
        check_keep(self.keep)


def _centres(rows: int, cols: int, h: int, w: int) -> LongTensor:
    """[h · w] raster cells of a rows × cols grid under the centres of an even h × w grid."""
    return (even_indices(rows, h)[:, None] * cols + even_indices(cols, w)).flatten()


@register_method("grid")
@dataclass(frozen=True)
class Grid(_KeepOnly):
    """Keep tokens at even distances: a rectangle of rows and columns, topped up evenly along the raster.

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "tokens at even distances"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        counts = tokens.budgets(self.keep)
        picks = [self._pick(tokens.layout, i, k) for i, k in enumerate(counts)]
        width = max(map(len, picks))
        keep = torch.stack([torch.nn.functional.pad(p, (0, width - len(p))) for p in picks])
        return Selection(keep.to(tokens.features.device), counts)

    @staticmethod
    def _pick(layout: Layout, image: int, k: int) -> LongTensor:
        rows, cols = layout.grid[image]
        if layout.n[image] != rows * cols:
            return even_indices(layout.n[image], k)
        chosen = torch.zeros(rows * cols, dtype=torch.bool)
        chosen[_centres(rows, cols, *fit_grid(k, rows, cols))] = True
        rest = (~chosen).nonzero()[:, 0]
        chosen[rest[even_indices(len(rest), k - int(chosen.sum()))]] = True
        return chosen.nonzero()[:, 0]


@register_method("pool")
@dataclass(frozen=True)
class Pool(_KeepOnly):
    """Average the tower's features over an even grid of rectangles, at most ``keep`` of them.

    The count is the largest rectangle of rows and columns that the budget holds (48 of 12 × 12 is 6 × 8). A pooled
    token takes the place of the token under its centre.

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "average pooling of the tower's features"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        layout = tokens.layout
        if len(set(layout.grid)) > 1 or any(n != h * w for n, (h, w) in zip(layout.n, layout.grid, strict=True)):
            raise ValueError("'pool' needs images of one plain grid in a batch; run tiled or mixed-size images singly.")
        rows, cols = layout.grid[0]
        h, w = fit_grid(tokens_to_keep(self.keep, rows * cols), rows, cols)
        if (h, w) == (rows, cols):
            return Selection(torch.arange(rows * cols, device=tokens.features.device).expand(len(layout), -1), layout.n)
        images, device = len(layout), tokens.features.device
        pooled = pool_grid(tokens.features.view(images, rows, cols, -1), h, w)
        keep = _centres(rows, cols, h, w).to(device).expand(images, -1)
        owner = bin_owner(rows, cols, h, w).to(device).expand(images, -1)
        state["flops"] = tokens.features.numel()
        return Selection(keep, [h * w] * images, features=pooled, owner=owner)


@register_method("resize")
@dataclass(frozen=True)
class Resize(_KeepOnly):
    """Shrink the image itself until the tower yields at most ``keep`` tokens; its position table is interpolated.

    The tower gets cheaper too. On native-resolution models this baseline beats most published methods
    (arXiv 2510.07143).

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "the image shrunk before the tower"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})

    def resolution(self, grid: tuple[int, int]) -> tuple[int, int]:
        return fit_grid(tokens_to_keep(self.keep, grid[0] * grid[1]), *grid)
