# SPDX-License-Identifier: Apache-2.0
"""Tokens that stand for rectangles of patches: where they go in the prompt and which patches each took in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .dtypes import LongTensor
from .ops.frames import subsampled
from .ops.pool import bin_owner, pool_grid
from .ops.select import even_indices
from .ops.windows import merge_windows
from .tokens import Selection

if TYPE_CHECKING:
    from .views import EntryTokens

#: [B, rows, cols, C], h, w → [B, h · w, C]
Pooling = Callable[[Tensor, int, int], Tensor]
#: (view, rows, columns) → (h, w) of the tokens that this view's unpadded rectangle is pooled to, (0, 0) for none
ViewTarget = Callable[[int, int, int], tuple[int, int]]


def centres(rows: int, cols: int, h: int, w: int) -> LongTensor:
    """[h · w] raster cells of a rows × cols grid under the centres of an even h × w grid."""
    return (even_indices(rows, h)[:, None] * cols + even_indices(cols, w)).flatten()


def apart(places: LongTensor, n: int) -> LongTensor:
    """Ascending ``places`` [m], m ≤ ``n``, moved behind each other where they coincide, and back from the end of ``n``."""
    step = torch.arange(len(places))
    behind = (places - step).cummax(0).values + step
    return behind.minimum(n - len(places) + step)


def rectangles(views: Tensor, widths: Sequence[int]) -> Iterator[tuple[LongTensor, tuple[int, int]]]:
    """Of every view in ``views`` [V, N] bool: its present cells in raster order and their (rows, columns).

    ``widths``: columns of each view's whole grid.
    """
    for present, across in zip(views, widths, strict=True):
        cells = present.nonzero()[:, 0]
        rows = len((cells // across).unique())
        yield cells, (rows, len(cells) // max(1, rows))


def pooled_images(tokens: EntryTokens, targets: Sequence[tuple[int, int]], pooling: Pooling = pool_grid) -> Selection:
    """Pool every image, one plain grid each, to its own ``targets[i]`` (h, w); a token stands at its cells' centre."""
    layout, device = tokens.layout, tokens.rows.device
    counts = [h * w for h, w in targets]
    images, width = len(layout), max(counts)
    if counts == layout.n:
        return Selection(torch.arange(width, device=device).expand(images, -1), counts)
    keep = torch.zeros(images, width, dtype=torch.long, device=device)
    owner = torch.full(layout.cell.shape, -1, device=device)
    features = tokens.features.new_zeros(images, width, tokens.features.shape[-1])
    for case in dict.fromkeys(zip(layout.grid, targets, strict=True)):
        mine = [i for i, other in enumerate(zip(layout.grid, targets, strict=True)) if other == case]
        (rows, cols), (h, w) = case
        here = torch.tensor(mine, device=device)
        pooled = pooling(tokens.features[here, : rows * cols].unflatten(1, (rows, cols)), h, w)
        features[here, : h * w] = pooled
        keep[here, : h * w] = centres(rows, cols, h, w).to(device)
        owner[here, : rows * cols] = bin_owner(rows, cols, h, w).to(device)
    return Selection(keep, counts, features=features, owner=owner)


def pooled_views(tokens: EntryTokens, target: ViewTarget, pooling: Pooling = pool_grid) -> Selection:
    """Pool every view of tiled images, what is left of it without padding; newlines of rows that keep a token stay."""
    layout, device = tokens.layout, tokens.rows.device
    views = tokens.view_cells().cpu()
    mask, home = torch.zeros_like(views), torch.full(views.shape, -1)
    table = tokens.rows.clone()
    for v, (cells, (rows, cols)) in enumerate(rectangles(views, layout.view_widths)):
        h, w = target(v, rows, cols) if len(cells) else (0, 0)
        if not h * w:
            continue
        there = cells[centres(rows, cols, h, w)]
        mask[v, there] = True
        home[v, cells] = there[bin_owner(rows, cols, h, w)]
        table[v, there.to(device)] = pooling(tokens.rows[v, cells.to(device)].view(1, rows, cols, -1), h, w)[0]
    return _of_cells(tokens, mask.to(device), home.to(device), table)


def resized_views(tokens: EntryTokens, rows: Sequence[Tensor], grids: Sequence[tuple[int, int] | None]) -> Selection:
    """Give every view of images without thumbnail the ``rows[v]`` [c, C] in place of its tokens, in their order.

    ``grids[v]``: the (h, w) that they form over the view, or None. They stand at the centres of its cells, or spread over
    it; a view with more rows than tokens takes the next places of its neighbours. A closing newline stays.
    """
    layout, device = tokens.layout, tokens.rows.device
    order = torch.arange(layout.cell.shape[1], device=device).expand_as(layout.cell)
    number = layout.to_views(order, fill=-1).cpu()
    patches, closed = layout.patch.sum(1).tolist(), (layout.valid & ~layout.patch).any(1).tolist()
    owner = torch.full(layout.cell.shape, -1)
    wanted: list[list[LongTensor]] = [[] for _ in patches]
    first = [0] * len(patches)
    views = zip(rectangles(number >= 0, layout.view_widths), layout.view_image.tolist(), rows, grids, strict=True)
    for v, ((cells, box), image, made, grid) in enumerate(views):
        fits = grid is not None and grid[0] <= box[0] and grid[1] <= box[1]
        place = centres(*box, *grid) if grid is not None and fits else subsampled(len(cells), len(made))
        wanted[image].append(number[v, cells[place]])
        if grid is not None and len(made):
            owner[image, number[v, cells]] = first[image] + bin_owner(*box, *grid)
        first[image] += len(made)
    counts = [many + (many > 0 and end) for many, end in zip(first, closed, strict=True)]
    keep = torch.zeros(len(counts), max(counts), dtype=torch.long)
    features = tokens.rows.new_zeros(*keep.shape, next(iter(rows)).shape[-1])
    for image, many in enumerate(first):
        keep[image, :many] = apart(torch.cat(wanted[image]), patches[image])
        mine = (layout.view_image == image).tolist()
        features[image, :many] = torch.cat([made for made, ours in zip(rows, mine, strict=True) if ours]).to(features)
        if counts[image] > many:
            keep[image, many], owner[image, patches[image]] = patches[image], many
    given = owner.to(device) if all(grid is not None for grid in grids) else None
    return Selection(keep.to(device), counts, features=features, owner=given)


def merged_windows(
    tokens: EntryTokens, window: int, threshold: float, *, shared: bool = False
) -> tuple[Selection, LongTensor] | None:
    """Average windows of alike tokens in every view, as the language model would get them, on the grid that they form.

    A mean stands at its window's centre. ``shared``: views of one size merge equally many windows. Returns the selection
    and, [V, N], the cell that stands for each cell now; None when nothing is alike enough.
    """
    layout, device = tokens.layout, tokens.rows.device
    mask, table = tokens.view_cells(), layout.to_views(tokens.embedded)
    shapes = list(rectangles(mask.cpu(), layout.view_widths))
    home = torch.arange(mask.shape[1], device=device).repeat(len(mask), 1)
    for shape in dict.fromkeys(shape for cells, shape in shapes if len(cells)):
        mine = [v for v, (_, other) in enumerate(shapes) if other == shape]
        cells = torch.stack([shapes[v][0] for v in mine]).to(device)
        views = torch.tensor(mine, device=device)[:, None]
        merged = merge_windows(table[views, cells], shape, (window, window), threshold, shared=shared)
        if merged is None:
            continue
        holder = merged.keep.gather(1, merged.owner)  # [v, cells] place of the cell that stands for each now
        home[views, cells] = cells.gather(1, holder)
        mask[views, cells] = holder == torch.arange(holder.shape[1], device=device)
        table[views, cells] = merged.hidden.gather(1, merged.owner[..., None].expand(-1, -1, table.shape[-1]))
    selection = _of_cells(tokens, mask, home, table)
    if selection.features is None:
        return None
    selection.embedded = True
    return selection, home


def _of_cells(tokens: EntryTokens, mask: Tensor, home: LongTensor, table: Tensor) -> Selection:
    """The cells in ``mask`` [V, N] with the features in ``table`` [V, N, C], newlines of rows that keep one beside them.

    ``home`` [V, N]: the cell that took in every cell, -1 for none.
    """
    layout, device = tokens.layout, table.device
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
