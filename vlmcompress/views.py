# SPDX-License-Identifier: Apache-2.0
"""What a method sees at each stage, and what it answers.

Every view hides the model family: attention rows come out in fp32 whatever the model's dtype and attention back-end
are, and no ``[heads, N, N]`` tensor is formed to get them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .cache_views import AttendLayer, CacheLayer, Eviction
from .dtypes import LongTensor
from .method import tokens_to_keep
from .ops.places import on_device
from .ops.pool import pool_grid
from .ops.select import largest_remainder, top_indices, top_mask
from .tokens import Frame, Layout, Selection
from .tower_views import Joined, TowerEdit, TowerLayer

__all__ = [
    "AttendLayer",
    "CacheLayer",
    "Cut",
    "EntryTokens",
    "Eviction",
    "Joined",
    "PrefillLayer",
    "Selection",
    "TowerEdit",
    "TowerLayer",
]


# ENTRY ----------------------------------------------------------------------------------------------------------
@dataclass
class EntryTokens:
    """The visual tokens that wait at the door of the language model, ``I`` images padded to ``n_max`` tokens.

    ``rows`` [V, N, C]: projector inputs per view and cell; ``pixel_values``: what the tower saw; ``pooled``: a flexible
    projector has already pooled the patches to the number of placeholders in the prompt; ``pooling``: how it would,
    [B, rows, cols, C], h, w → [B, h · w, C]. ``unpooled`` [V, patches, C]: what the projector made of the patches that
    the model pools to ``rows`` behind it, for methods that ask for it (``Method.before_pooling``).
    """

    layout: Layout
    rows: Tensor
    pixel_values: Tensor | None
    pooled: bool = False
    pooling: Callable[[Tensor, int, int], Tensor] = pool_grid
    unpooled: Tensor | None = None
    _project: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def projected(self) -> Tensor:
        """[I, n_max, C'] all tokens as the language model would get them, zero where no patch stands; without gradient.

        Runs the projector once more, which otherwise sees the chosen rows alone. Where tokens are not made row by row,
        these are :attr:`features`.
        """
        with torch.no_grad():
            return self.embedded

    @cached_property
    def embedded(self) -> Tensor:
        """:attr:`projected` with its gradient, for selections that feed them (``Selection.embedded``)."""
        return self.features if self._project is None else self.layout.of_views(self._project(self.rows))

    @cached_property
    def features(self) -> Tensor:
        """[I, n_max, C] projector inputs in image order, zero where no patch stands; gathered when first asked for."""
        return self.layout.of_views(self.rows)

    def budgets(self, keep: int | float) -> list[int]:
        """Patches that each image or video may keep; newlines come on top (see :meth:`select`)."""
        layout = self.layout
        if layout.thumbnail is not None:
            return [tokens_to_keep(keep, n) for n in layout.patch.sum(1).tolist()]
        return [tokens_to_keep(keep, n - layout.closing_newline) for n in layout.n]

    def view_budgets(self, keep: int | float) -> list[int]:
        """Tokens that each view may keep: its image's budget split evenly over its views, rounded so that it adds up.

        A view holds only what is left of it without padding; what it cannot take goes to the others.
        """
        owner, caps = self.layout.view_image.tolist(), self.view_cells().sum(1).tolist()
        found = []
        for image, budget in enumerate(self.budgets(keep)):
            mine = [cap for cap, i in zip(caps, owner, strict=True) if i == image]
            found += largest_remainder([1.0] * len(mine), budget, mine)
        return found

    def view_cells(self) -> Tensor:
        """[V, N] bool: cells that are tokens (not cut off as padding)."""
        return self.layout.to_views(self.layout.patch, fill=False)

    def select(self, scores: Tensor, keep: int | float, *, pooled: bool = False, newlines: bool = True) -> Selection:
        """Selection of the tokens with the largest ``scores`` [I, n_max], in the order of the uncompressed model.

        Tiled images: ``keep`` counts patches and is split evenly over an image's views (``pooled``: one ranking for all
        of them); every row of the picture in which a crop's patch stays brings its newline (``newlines=False``: none,
        unless everything stays). All frames of a video share one ranking.
        """
        layout, counts = self.layout, self.budgets(keep)
        if layout.thumbnail is None and not layout.closing_newline:
            return Selection(top_indices(scores, counts), counts)
        if pooled or layout.thumbnail is None:
            mask = top_mask(scores.masked_fill(~layout.patch, float("-inf")), counts)
        else:
            best = top_mask(layout.to_views(scores, fill=float("-inf")), self.view_budgets(keep))
            mask = layout.of_views(best, fill=False)
        return self.select_mask(mask, newlines=newlines)

    def select_mask(self, mask: Tensor, *, newlines: bool = True) -> Selection:
        """Selection of the patches in ``mask`` [I, n_max], with the newlines that :meth:`select` speaks of."""
        layout = self.layout
        # an image that keeps every patch keeps every newline, also those of rows that unpadding has emptied
        whole = (mask | ~layout.patch).all(1, keepdim=True)
        return Selection.from_mask(layout, whole | (layout.with_newlines(mask) if newlines else mask))

    def pixels_of(self, image: int) -> Tensor | None:
        """What the tower saw of one image: [views, ...], or [patches, ...] where the tower takes a pack of patches."""
        pixels, sizes = self.pixel_values, self.layout.view_sizes
        if pixels is None:
            return None
        mine = (self.layout.view_image == image).tolist()
        if len(pixels) == len(mine):
            return pixels[torch.tensor(mine, device=pixels.device)]
        if len(pixels) % sum(sizes):
            return None
        pieces = pixels.split([n * (len(pixels) // sum(sizes)) for n in sizes])
        return torch.cat([piece for piece, ours in zip(pieces, mine, strict=True) if ours])

    def noise(self, seed: int) -> Tensor:
        """[I, n_max] fp32, uniform in [0, 1): drawn from ``seed`` and each image's own pixels.

        An image gets the same noise alone, in any batch, and when a checkpointed tower runs again.
        """
        table = torch.zeros(self.layout.cell.shape)
        for image, n in enumerate(self.layout.n):
            pixels = self.pixels_of(image)
            digest = 0 if pixels is None else zlib.crc32(pixels.detach().float().cpu().numpy().tobytes())
            generator = torch.Generator().manual_seed(seed + (digest << 16))
            table[image, :n] = torch.rand(n, generator=generator)
        return table.to(self.layout.cell.device)

    def of_views(self, per_cell: Tensor, fill: float = 0.0) -> Tensor:
        """[V, N, ...] per view and cell → [I, n_max, ...] in image order."""
        return self.layout.of_views(per_cell, fill)


# PREFILL --------------------------------------------------------------------------------------------------------
@dataclass
class PrefillLayer:
    """One decoder layer that has just run on the prompt.

    ``hidden`` [B, S_f, D]: its output; ``frame``: which token stands in which slot; ``layout``: geometry of the images.
    """

    index: int
    depth: int
    hidden: Tensor
    frame: Frame
    layout: Layout
    _attention: Callable[[LongTensor, bool], Tensor]
    _values: Callable[[], tuple[Tensor, int]]
    _cost: Callable[[LongTensor, bool], int]
    #: floating-point operations that the calls of :meth:`attention` and :meth:`values` have taken so far
    flops: int = 0

    def attention(self, rows: LongTensor, *, following: bool = False) -> Tensor:
        """[B, H, R, S_f] fp32 attention of the slots ``rows`` [B, R] over all causally visible keys of this layer.

        ``following=True`` asks the next layer's projections, applied to this layer's output. Rows that are padding
        (index -1) come out as zeros. Keys of earlier chunks on the same cache take part in the softmax, but have no
        column.
        """
        self.flops += self._cost(rows, following)
        return self._attention(rows, following)

    def mean_attention(self, rows: LongTensor, *, following: bool = False, chunk: int = 256) -> Iterator[Tensor]:
        """:meth:`attention` averaged over heads, [B, r, S_f] for ``chunk`` rows at a time.

        A long instruction would otherwise make a tensor of heads × text × sequence.
        """
        for part in rows.split(chunk, dim=1):
            yield self.attention(part, following=following).mean(1)

    def values(self) -> Tensor:
        """[B, H_kv, S_f, d] value states of this layer."""
        states, cost = self._values()
        self.flops += cost
        return states

    def instruction_rows(self) -> LongTensor:
        """[B, R] slots of the text after each sample's last visual token, ascending, padded with -1 in front.

        A sample without such text falls back to all its text, then to its last token.
        """
        frame, length = self.frame, self.frame.index.shape[1]
        slot = torch.arange(length, device=frame.index.device)
        last_visual = torch.where(frame.visual, slot, -1).amax(1, keepdim=True)
        rows = frame.text & (slot > last_visual)
        rows = torch.where(rows.any(1, keepdim=True), rows, frame.text)
        rows = torch.where(rows.any(1, keepdim=True), rows, slot == frame.last[:, None])
        width = int(rows.sum(1).max())
        order = rows.to(torch.uint8).argsort(dim=1, stable=True)[:, length - width :]
        return order.masked_fill(~rows.gather(1, order), -1)

    def of_images(self, per_slot: Tensor, fill: float = 0.0) -> Tensor:
        """[B, S_f] per slot → [I, c_max] per alive visual token of each image."""
        slots, valid = self.frame.slots()
        return per_slot[self.layout.batch_index, slots].masked_fill(~valid, fill)

    def to_slots(self, per_token: Tensor, fill: float = 0.0) -> Tensor:
        """[I, c_max] per alive visual token → [B, S_f] per slot, ``fill`` elsewhere."""
        slots, valid = self.frame.slots()
        shape = self.frame.index.shape
        place = (self.layout.batch_index * shape[1] + slots).masked_fill(~valid, shape.numel())
        table = per_token.new_full((shape.numel() + 1,), fill)
        return table.scatter(0, place.flatten(), per_token.flatten())[:-1].view(shape)

    def together(self) -> PrefillLayer:
        """This layer with all images of a sample taken for one: what is per image is then per sample that has some."""
        samples, frame = sorted(set(self.layout.sample)), self.frame
        owner = on_device([samples.index(sample) for sample in self.layout.sample], frame.index.device)
        alive = dict.fromkeys(samples, 0)
        for sample, count in zip(self.layout.sample, frame.counts, strict=True):
            alive[sample] += count
        joined = replace(
            frame, image=torch.where(frame.image < 0, frame.image, owner[frame.image.clamp_min(0)]),
            counts=list(alive.values()), image_row=on_device(samples, frame.index.device),
        )  # fmt: skip
        return replace(self, frame=joined, layout=replace(self.layout, sample=samples), flops=0)

    def apart(self, cut: Cut) -> Cut:
        """A cut of :meth:`together`, its counts per image again."""
        slots, valid = self.frame.slots()
        return Cut(cut.mask, (cut.mask[self.layout.batch_index, slots] & valid).sum(1).tolist())

    def tokens(self) -> LongTensor:
        """[I, c_max] number of every alive token among its image's original ones, in slot order; padding is 0."""
        slots, valid = self.frame.slots()
        columns = self.frame.index[self.layout.batch_index, slots]
        table = self.layout.column.masked_fill(~self.layout.valid, torch.iinfo(torch.long).max)
        return torch.searchsorted(table, columns).masked_fill(~valid, 0)

    def ranking(self, per_token: Tensor) -> Tensor:
        """[I, c_max] scores of alive tokens in the form of ``state["scores"]``, per original token of the tower's images.

        Copies of one image (beams) rank alike, so the first one stands for all; tokens that are gone get ``-inf``.
        """
        _, valid = self.frame.slots()
        source = self.layout.source
        # padding lands in one spare column behind the tokens
        width = self.layout.cell.shape[1]
        table = per_token.new_full((len(source), width + 1), float("-inf"))
        table.scatter_(1, self.tokens().masked_fill(~valid, width), per_token)
        return table[[source.index(i) for i in range(max(source) + 1)], :width]

    def keep(self, chosen: Tensor, counts: list[int] | None = None) -> Cut:
        """Cut that keeps ``chosen`` [I, c_max] (bool) of each image's alive tokens.

        ``counts``: how many that is per image; without it the counts are read from the device.
        """
        slots, valid = self.frame.slots()
        chosen = chosen & valid
        visual = self.frame.visual
        # by scatter, not by a boolean index, which a GPU would have to be waited for; the others land in a spare place
        place = (self.layout.batch_index * visual.shape[1] + slots).masked_fill(~chosen, visual.numel())
        kept = visual.new_zeros(visual.numel() + 1).scatter(0, place.flatten(), True)[:-1].view_as(visual)
        return Cut(kept | ~visual, counts if counts is not None else chosen.sum(1).tolist())


@dataclass
class Cut:
    """``mask`` [B, S_f]: slots that go on (text must stay); ``counts[i]``: visual tokens of image i among them."""

    mask: Tensor
    counts: list[int]
