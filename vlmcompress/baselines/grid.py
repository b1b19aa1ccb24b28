# SPDX-License-Identifier: Apache-2.0
"""Uniform choice, average pooling and a smaller image: what needs no score at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.pool import bin_owner, pool_grid
from ..ops.select import even_indices, fit_grid
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


def _centres(rows: int, cols: int, h: int, w: int) -> LongTensor:
    """[h · w] raster cells of a rows × cols grid under the centres of an even h × w grid."""
    return (even_indices(rows, h)[:, None] * cols + even_indices(cols, w)).flatten()


def _even_cells(rows: int, cols: int, k: int) -> LongTensor:
    """[k] raster cells of a rows × cols grid: an even rectangle, topped up evenly along the raster; ascending."""
    chosen = torch.zeros(rows * cols, dtype=torch.bool)
    if k:
        chosen[_centres(rows, cols, *fit_grid(k, rows, cols))] = True
        rest = (~chosen).nonzero()[:, 0]
        chosen[rest[even_indices(len(rest), k - int(chosen.sum()))]] = True
    return chosen.nonzero()[:, 0]


def _rectangles(views: Tensor, tokens: EntryTokens, keep: int | float):
    """Of every view of tiled images: its unpadded cells in raster order, their (rows, columns) and its budget."""
    across = tokens.layout.view_grid[1]
    for present, k in zip(views, tokens.view_budgets(keep), strict=True):
        cells = present.nonzero()[:, 0]
        rows = len((cells // across).unique())
        yield cells, (rows, len(cells) // max(1, rows)), k


@register_method("grid")
@dataclass(frozen=True)
class Grid(_KeepOnly):
    """Keep tokens at even distances: a rectangle of rows and columns, topped up evenly along the raster.

    Tiled images: so in every view, on what is left of it without padding; the newlines of rows that keep a patch come
    on top of ``keep``.

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "tokens at even distances"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        if tokens.layout.thumbnail is not None:
            views = tokens.view_cells().cpu()
            mask = torch.zeros_like(views)
            for v, (cells, (rows, cols), k) in enumerate(_rectangles(views, tokens, self.keep)):
                mask[v, cells[_even_cells(rows, cols, k)]] = True
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
    padding; the newlines of rows that keep a token come on top of ``keep``.

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "average pooling of the tower's features"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        layout = tokens.layout
        state["flops"] = tokens.features.numel()
        if layout.thumbnail is not None:
            return self._tiled(tokens)
        if len(set(layout.grid)) > 1 or any(n != h * w for n, (h, w) in zip(layout.n, layout.grid, strict=True)):
            raise ValueError("'pool' needs images of one plain grid in a batch; run tiled or mixed-size images singly.")
        rows, cols = layout.grid[0]
        h, w = fit_grid(tokens_to_keep(self.keep, rows * cols), rows, cols)
        if (h, w) == (rows, cols):
            return Selection(torch.arange(rows * cols, device=tokens.rows.device).expand(len(layout), -1), layout.n)
        images, device = len(layout), tokens.rows.device
        pooled = pool_grid(tokens.features.view(images, rows, cols, -1), h, w)
        keep = _centres(rows, cols, h, w).to(device).expand(images, -1)
        owner = bin_owner(rows, cols, h, w).to(device).expand(images, -1)
        return Selection(keep, [h * w] * images, features=pooled, owner=owner)

    def _tiled(self, tokens: EntryTokens) -> Selection:
        layout, device = tokens.layout, tokens.rows.device
        views = tokens.view_cells().cpu()
        mask, home = torch.zeros_like(views), torch.full(views.shape, -1)
        table = tokens.rows.clone()
        for v, (cells, (rows, cols), k) in enumerate(_rectangles(views, tokens, self.keep)):
            if not k:
                continue
            h, w = fit_grid(k, rows, cols)
            centres = cells[_centres(rows, cols, h, w)]
            mask[v, centres] = True
            home[v, cells] = centres[bin_owner(rows, cols, h, w)]
            there = cells.to(device)
            table[v, centres.to(device)] = pool_grid(table[v, there].view(1, rows, cols, -1), h, w)[0]
        mask, home = mask.to(device), home.to(device)
        selection = tokens.select_mask(tokens.of_views(mask, fill=False))
        if selection.counts == layout.n:
            return selection
        order = torch.arange(layout.cell.shape[1], device=device).expand_as(layout.cell)
        token = layout.to_views(order, fill=-1)  # [V, N] number of each cell's token in its image
        owner_token = tokens.of_views(token.gather(1, home.clamp_min(0)).masked_fill(home < 0, -1), fill=-1)
        place = selection.places(layout.cell.shape[1])
        newline = layout.valid & ~layout.patch
        owner = place.gather(1, torch.where(newline, order, owner_token.clamp_min(0)))
        owner = owner.masked_fill(~newline & (owner_token < 0), -1)
        features = tokens.of_views(table).gather(1, selection.keep[..., None].expand(-1, -1, table.shape[-1]))
        return Selection(selection.keep, selection.counts, features=features, owner=owner)


@register_method("resize")
@dataclass(frozen=True)
class Resize(_KeepOnly):
    """Shrink the image itself until the tower yields at most ``keep`` tokens; its position table is interpolated.

    The tower gets cheaper too. Tiled images shrink view by view, by a share. On native-resolution models this baseline
    beats most published methods (arXiv 2510.07143).

    Args:
        keep: visual tokens per image, or their share.
    """

    summary: ClassVar[str] = "the image shrunk before the tower"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})

    def check_family(self, adapter: Adapter) -> None:
        if adapter.tiled and isinstance(self.keep, int):
            raise ValueError(
                "'resize' shrinks all views of tiled images alike, however many an image has; give keep as a share "
                "(float)."
            )

    def resolution(self, grid: tuple[int, int]) -> tuple[int, int]:
        return fit_grid(tokens_to_keep(self.keep, grid[0] * grid[1]), *grid)
