# SPDX-License-Identifier: Apache-2.0
"""Uniform choice, average pooling and a smaller image: what needs no score at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from ..dtypes import LongTensor
from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.select import even_indices, fit_grid
from ..pooled import centres, pooled_images, pooled_views, rectangles
from ..registry import register_method
from ..tokens import Layout
from ..views import EntryTokens, Selection

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@dataclass(frozen=True)
class _KeepOnly(Method):
    keep: int | float = 64

    def validate(self) -> None:
        check_keep(self.keep)


def _even_cells(rows: int, cols: int, k: int) -> LongTensor:
    """[k] raster cells of a rows × cols grid: an even rectangle, topped up evenly along the raster; ascending."""
    chosen = torch.zeros(rows * cols, dtype=torch.bool)
    if k:
        chosen[centres(rows, cols, *fit_grid(k, rows, cols))] = True
        rest = (~chosen).nonzero()[:, 0]
        chosen[rest[even_indices(len(rest), k - int(chosen.sum()))]] = True
    return chosen.nonzero()[:, 0]


@register_method("grid")
@dataclass(frozen=True)
class Grid(_KeepOnly):
    """Keep tokens at even distances: a rectangle of rows and columns, topped up evenly along the raster.

    Tiled images: so in every view, on what is left of it without padding; the newlines of rows that keep a patch come
    on top of ``keep``. Videos: so in every frame.

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "tokens at even distances"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        if tokens.layout.by_views:
            views, budgets = tokens.view_cells().cpu(), tokens.view_budgets(self.keep)
            mask = torch.zeros_like(views)
            for v, (cells, (rows, cols)) in enumerate(rectangles(views, tokens.layout.view_widths)):
                mask[v, cells[_even_cells(rows, cols, budgets[v])]] = True
            return tokens.select_mask(tokens.of_views(mask.to(tokens.rows.device), fill=False))
        counts = tokens.budgets(self.keep)
        picks = [self._pick(tokens.layout, i, k) for i, k in enumerate(counts)]
        width = max(map(len, picks))
        keep = torch.stack([torch.nn.functional.pad(p, (0, width - len(p))) for p in picks])
        return Selection(keep.to(tokens.rows.device), counts)

    @staticmethod
    def _pick(layout: Layout, image: int, k: int) -> LongTensor:
        rows, cols = layout.grid[image]
        if layout.n[image] != rows * cols:
            return even_indices(layout.n[image], k)
        return _even_cells(rows, cols, k)


@register_method("pool")
@dataclass(frozen=True)
class Pool(_KeepOnly):
    """Average the tower's features over an even grid of rectangles, at most ``keep`` of them.

    The count is the largest rectangle of rows and columns that the budget holds (48 of 12 × 12 is 6 × 8). A pooled
    token takes the place of the token under its centre. Tiled images: so in every view, on what is left of it without
    padding; the newlines of rows that keep a token come on top of ``keep``. Videos: so in every frame.

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "average pooling of the tower's features"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        layout = tokens.layout
        state["flops"] = tokens.features.numel()
        if layout.by_views:
            budgets = tokens.view_budgets(self.keep)
            return pooled_views(
                tokens, lambda v, rows, cols: fit_grid(budgets[v], rows, cols) if budgets[v] else (0, 0)
            )
        if any(n != h * w for n, (h, w) in zip(layout.n, layout.grid, strict=True)):
            raise ValueError("'pool' needs images whose tokens form one plain grid.")
        return pooled_images(tokens, [fit_grid(tokens_to_keep(self.keep, h * w), h, w) for h, w in layout.grid])


@register_method("resize")
@dataclass(frozen=True)
class Resize(_KeepOnly):
    """Shrink the image itself until the tower yields at most ``keep`` tokens; its position table is interpolated.

    The tower gets cheaper too. Tiled images shrink view by view, by a share. On native-resolution models, where it
    beats most published methods (arXiv 2510.07143), the processor takes smaller pictures as they are.

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "the image shrunk before the tower"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})
    joins_patches: ClassVar[bool] = True

    def check_family(self, adapter: Adapter) -> None:
        if adapter.packed_tower:
            raise ValueError(
                "'resize' has nothing to do where images keep their own resolution: hand the processor smaller pictures."
            )
        if adapter.tiled and isinstance(self.keep, int):
            raise ValueError(
                "'resize' shrinks all views of tiled images alike, however many an image has; give keep as a share "
                "(float)."
            )

    def resolution(self, grid: tuple[int, int]) -> tuple[int, int]:
        return fit_grid(tokens_to_keep(self.keep, grid[0] * grid[1]), *grid)
