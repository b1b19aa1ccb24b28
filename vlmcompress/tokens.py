# SPDX-License-Identifier: Apache-2.0
"""Where every visual token of one forward pass comes from, which are chosen, and the sequences they travel in.

:class:`Layout` is the geometry of the images as the uncompressed model would feed them, :class:`Selection` what enters
the language model, :class:`Frame` the sequence that a range of its layers sees. All tensors stay on the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .dtypes import LongTensor
from .ops.places import leading, on_device
from .ops.pooling import Pooling

#: value of ``Layout.cell`` for tokens that no vision patch produced (``image_newline`` embeddings)
NEWLINE = -1


@dataclass
class Layout:
    """Geometry of ``I`` images (or videos), padded to the longest (``n_max`` tokens).

    ``n[i]`` visual tokens, ``grid[i]`` (rows, columns) of the picture they form, ``kind[i]`` "image" or "video".
    ``view`` and ``cell`` [I, n_max]: the crop or frame of each token (index along the tower's batch) and the row of
    the projector's output in it; ``cell`` is ``NEWLINE`` for tokens without a patch. ``row``, ``col``: place in ``grid``
    (frames of a video are stacked as further rows). ``valid`` marks the tokens that exist. ``view_image`` [V]: the
    image that each view belongs to, ``view_grid`` the (rows, columns) of one view's cells. Where views differ in size,
    ``view_n[v]`` is how many cells view v has, and ``view_grid`` is (1, the most).

    Tiled images: ``tiles[i]`` (rows, columns) of the crops that image i was cut into, in raster order among its views,
    and ``thumbnail`` [V] marks the views that show a whole image once more in small. ``grid`` is then the picture
    without its padding, crop tokens stand at their true place in it, thumbnail tokens at the cell under their centre
    and a newline behind the last column of its row. Both are empty for families that do not tile.

    ``window`` [V, N]: for towers in which some layers attend inside windows only, the window of every cell, counted
    within its view in the order in which the tower takes them.

    ``closing_newline``: one newline ends each video (or image that is not tiled). ``pooling``: how the model pools the
    patches of its tower into the cells of this layout, where it does; ``projected[v]`` is then how many rows of view v
    pass the projector whatever is chosen (0 or None: only what is chosen); ``chosen_again``: what is chosen once more.

    A layout is *placed* once the prompt is known: ``sample[i]`` is then the batch row, ``column`` [I, n_max] the
    position of each token in the caller's chunk, and ``source[i]`` the image's number among those that the tower saw
    (beams share one).
    """

    n: list[int]
    grid: list[tuple[int, int]]
    kind: list[str]
    view: LongTensor
    cell: LongTensor
    row: LongTensor
    col: LongTensor
    valid: Tensor
    view_image: LongTensor
    view_grid: tuple[int, int]
    sample: list[int] = field(default_factory=list)
    column: LongTensor = None  # type: ignore[assignment]
    source: list[int] = field(default_factory=list)
    tiles: list[tuple[int, int]] = field(default_factory=list)
    thumbnail: Tensor | None = None
    view_n: list[int] | None = None
    window: LongTensor | None = None
    pooling: Pooling | None = None
    closing_newline: bool = False
    projected: list[int] | None = None
    chosen_again: bool = False

    def __len__(self) -> int:
        return len(self.n)

    @cached_property
    def batch_index(self) -> LongTensor:
        """[I, 1] batch row of each image, on the layout's device."""
        return on_device(self.sample, self.cell.device)[:, None]

    def of_views(self, per_cell: Tensor, fill: float = 0.0) -> Tensor:
        """Bring a value per view and cell, [V, N, ...], to image order, [I, n_max, ...]; ``fill`` where no patch is."""
        picked = per_cell[self.view.clamp_min(0), self.cell.clamp_min(0)]
        gone = (self.cell < 0) | ~self.valid
        return picked.masked_fill(gone.reshape(*gone.shape, *[1] * (picked.ndim - 2)), fill)

    def to_views(self, per_token: Tensor, fill: float = 0.0) -> Tensor:
        """Bring a value per token in image order, [I, n_max, ...], to view and cell, [V, N, ...]; ``fill`` elsewhere.

        For a layout that is not placed. Cells without a token are the padding that a tiled model cuts off.
        """
        views, cells = len(self.view_image), self.view_grid[0] * self.view_grid[1]
        spare = views * cells
        target = torch.where(self.patch, self.view * cells + self.cell, spare).flatten()
        table = per_token.new_full((spare + 1, *per_token.shape[2:]), fill)
        table[target] = per_token.flatten(0, 1)
        return table[:-1].unflatten(0, (views, cells))

    @property
    def patch(self) -> Tensor:
        """[I, n_max] bool: tokens that stand for a vision patch (no newline, no padding)."""
        return self.valid & (self.cell >= 0)

    @property
    def view_sizes(self) -> list[int]:
        """Number of cells of every view."""
        return self.view_n or [self.view_grid[0] * self.view_grid[1]] * len(self.view_image)

    @property
    def by_views(self) -> bool:
        """Whether an image's crops, or a video's frames, are rectangles of one kind of grid, to be treated one by one."""
        return self.thumbnail is not None or "video" in self.kind

    @property
    def view_widths(self) -> list[int]:
        """Columns of every view's grid."""
        if self.view_n is None:
            return [self.view_grid[1]] * len(self.view_image)
        return [self.grid[image][1] for image in self.view_image.tolist()]

    @property
    def one_view(self) -> bool:
        """Whether every image is one view, each of whose cells is a token, without newlines."""
        cells = self.view_grid[0] * self.view_grid[1]
        return len(self.view_image) == len(self.n) and all(n == cells for n in self.n)

    def with_newlines(self, mask: Tensor) -> Tensor:
        """Add to ``mask`` [I, n_max] the newline of every row of the picture in which a crop's token is kept.

        A newline that closes a whole image or video stays while any of its tokens does.
        """
        newline = (self.cell == NEWLINE) & self.valid
        if self.one_view or not bool(newline.any()):
            return mask
        crop = mask & self.patch
        closed = torch.full((len(self), 1), self.closing_newline, device=mask.device)
        if self.thumbnail is not None:
            closed |= torch.bincount(self.view_image, minlength=len(self))[:, None] == 1
            crop &= ~self.thumbnail[self.view.clamp_min(0)] | closed
        occupied = torch.zeros(len(self), max(h for h, _ in self.grid), dtype=torch.int32, device=mask.device)
        occupied.scatter_add_(1, self.row, crop.int())
        stays = torch.where(closed, crop.any(1, keepdim=True), occupied.gather(1, self.row).bool())
        return mask | (newline & stays)

    def placed(self, placeholders: Tensor) -> Layout:
        """This layout in the prompt whose placeholders are ``placeholders`` [B, S] bool.

        Images follow each other in reading order; where the batch was expanded (beams, several answers) every copy of
        a row gets its row's images. Raises ``ValueError`` when placeholders and tokens do not match in number.
        """
        per_row, kind = placeholders.sum(1).tolist(), self.kind[0]
        total, found = sum(self.n), sum(per_row)
        copies = found // total
        if not copies or found % total or len(per_row) % copies:
            raise ValueError(
                f"The prompt has {found} {kind} placeholders, but its {kind}s make {total} visual tokens; build the prompt "
                "with the model's processor and feed it in one piece."
            )
        source: list[int] = []
        sample: list[int] = []
        start = end = 0
        for row, wanted in enumerate(per_row):
            if row % copies == 0:
                start = end
                while sum(self.n[start:end]) < wanted and end < len(self):
                    end += 1
            if sum(self.n[start:end]) != wanted:
                raise ValueError(
                    f"Row {row} of the batch has {wanted} {kind} placeholders, which is no whole number of {kind}s."
                )
            source += range(start, end)
            sample += [row] * (end - start)
        pick = on_device(source, self.cell.device)
        n = [self.n[i] for i in source]
        columns = placeholders.nonzero()[:, 1].split(n)
        return replace(
            self, n=n, grid=[self.grid[i] for i in source], kind=[self.kind[i] for i in source], view=self.view[pick],
            cell=self.cell[pick], row=self.row[pick], col=self.col[pick], valid=self.valid[pick], sample=sample,
            column=torch.nn.utils.rnn.pad_sequence(list(columns), batch_first=True), source=source,
            tiles=[self.tiles[i] for i in source] if self.tiles else [],
        )  # fmt: skip


@dataclass
class Selection:
    """Visual tokens that enter the language model.

    ``keep`` [I, k_max]: indices into each image's tokens **in feeding order**, padded; ``counts[i]`` of them are real.
    ``features`` [I, k_max, C] replaces the gathered projector inputs where tokens were merged or pooled; ``embedded``:
    they are vectors of the language model already, made from ``EntryTokens.embedded``.
    ``owner`` [I, n_max]: for every original token the place in ``keep`` that took it in, -1 if it was dropped; only
    merging methods give it. ``copies`` [I, k_max]: the token whose embedding each entry carries, where a method feeds
    one token (a newline) several times: the entry then only lends its place in the prompt.
    """

    keep: LongTensor
    counts: list[int]
    features: Tensor | None = None
    owner: LongTensor | None = None
    copies: LongTensor | None = None
    embedded: bool = False

    @classmethod
    def from_mask(cls, layout: Layout, mask: Tensor) -> Selection:
        """The tokens marked in ``mask`` [I, n_max], in the order of the uncompressed model."""
        mask = mask & layout.valid
        counts = mask.sum(1).tolist()
        keep = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : max(counts, default=0)]
        return cls(keep, counts)

    @property
    def real(self) -> Tensor:
        """[I, k_max] bool: entries of ``keep`` that are no padding."""
        return leading(self.counts, self.keep.shape[1], self.keep.device)

    def places(self, n_max: int) -> LongTensor:
        """[I, n_max] place in ``keep`` of every token, -1 for dropped ones."""
        place = torch.arange(self.keep.shape[1], device=self.keep.device).expand_as(self.keep)
        # padding writes to a spare column
        target = torch.where(self.real, self.keep, n_max)
        table = torch.full((len(self.keep), n_max + 1), -1, dtype=torch.long, device=place.device)
        return table.scatter(1, target, place)[:, :n_max]

    def of(self, source: list[int]) -> Selection:
        """The same choice for the images ``source``, in that order."""
        pick = on_device(source, self.keep.device)
        owner = None if self.owner is None else self.owner[pick]
        copies = None if self.copies is None else self.copies[pick]
        return Selection(self.keep[pick], [self.counts[i] for i in source], owner=owner, copies=copies)


@dataclass
class Frame:
    """The sequence as one range of decoder layers sees it.

    ``index`` [B, S_f]: column of the caller's chunk in each slot; ``valid`` [B, S_f] or None when no slot is padding;
    ``image`` [B, S_f]: index of the image that the slot belongs to, -1 for text; ``counts[i]``: visual tokens of image
    i alive here; ``positions`` [B, S_f] or [axes, B, S_f]: position id of each slot, before what earlier chunks on the
    same cache take off; ``total_shift`` [B]: what this chunk takes off the positions of everything after it;
    ``image_row`` [I]: batch row of each image.
    """

    index: LongTensor
    valid: Tensor | None
    image: LongTensor
    counts: list[int]
    positions: LongTensor
    image_row: LongTensor
    total_shift: LongTensor | None = None
    first_layer: int = 0

    @property
    def visual(self) -> Tensor:
        """[B, S_f] bool: real visual tokens."""
        seen = self.image >= 0
        return seen if self.valid is None else seen & self.valid

    @property
    def text(self) -> Tensor:
        """[B, S_f] bool: real text tokens."""
        text = self.image < 0
        return text if self.valid is None else text & self.valid

    @property
    def last(self) -> LongTensor:
        """[B] slot of the last real token of each sample."""
        length = self.index.shape[1]
        if self.valid is None:
            return torch.full((len(self.index),), length - 1, device=self.index.device)
        return length - 1 - self.valid.flip(1).int().argmax(1)

    def slots(self) -> tuple[LongTensor, Tensor]:
        """Slot of every alive visual token per image: ([I, c_max] ascending slots, [I, c_max] valid)."""
        images = torch.arange(len(self.counts), device=self.image.device)
        rows = self.image_row
        mine = self.image[rows] == images[:, None]
        if self.valid is not None:
            mine &= self.valid[rows]
        width = max(self.counts, default=0)
        order = mine.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        return order, mine.gather(1, order)


def pack(keep: Tensor, length: int, rank: LongTensor | None = None) -> tuple[LongTensor, Tensor]:
    """Flush the kept slots of every row to the right.

    ``keep`` [B, S] bool; ``length``: the largest number kept in a row; ``rank`` [B, S] orders the kept slots (default:
    as they stand). Returns ``index`` [B, length], each row's slots all different, and ``valid`` [B, length]. Slots that
    are padding point at dropped ones, so that scattering by ``index`` never hits a kept one twice.
    """
    if rank is None:
        rank = torch.arange(1, keep.shape[1] + 1, device=keep.device).expand_as(keep)
    index = rank.masked_fill(~keep, 0).argsort(dim=1, stable=True)[:, keep.shape[1] - length :]
    return index, keep.gather(1, index)
