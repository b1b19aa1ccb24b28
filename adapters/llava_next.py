# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a thumbnail and AnyRes crops per image, padding cut off, a newline embedding behind every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from ..dtypes import LongTensor
from ..registry import register_adapter
from ..tokens import NEWLINE, Layout
from .base import Adapter


@register_adapter("llava_next")
class LlavaNextAdapter(Adapter):
    """``LlavaNextForConditionalGeneration`` with any text model that has LLaMA's layer structure.

    An image's tokens come as the thumbnail's cells in raster order, then row by row the unpadded cells of all crops
    with a newline behind each row. The layout's ``grid`` is the unpadded picture, so that what was kept can be drawn on
    the user's own image: crop tokens stand at their own cell, a thumbnail token, which covers several cells, at the one
    under its centre (both show the same picture). View 0 of an image is the thumbnail; the crops follow in raster
    order.
    """

    tiled = True

    def geometry(self, given: dict[str, Any]) -> Layout:
        sizes, device = given["image_sizes"], given["pixel_values"].device
        sizes = sizes.tolist() if isinstance(sizes, torch.Tensor) else [list(size) for size in sizes]
        _, tiles = self._cut(given)
        views = [1 + rows * cols for rows, cols in tiles]
        side = self._side
        cells = side * side
        # the model packs the numbers of the cells as it will pack their features: its own order, unpadding included
        numbers = torch.arange(sum(views) * cells, dtype=torch.float64).view(-1, cells, 1)
        packed, lengths = self.inner.pack_image_features(
            list(numbers.split(views)),
            sizes,
            vision_feature_select_strategy="default",
            image_newline=torch.tensor([float(NEWLINE)], dtype=torch.float64),
        )
        token = torch.nn.utils.rnn.pad_sequence([p[:, 0].long() for p in packed], batch_first=True, padding_value=-2)
        valid, patch = token > -2, token >= 0
        view = torch.where(patch, token // cells, -1)
        cell = torch.where(patch, token % cells, NEWLINE)
        grid, row, col = [], torch.zeros_like(token), torch.zeros_like(token)
        for i, n in enumerate(lengths.tolist()):
            height = int((token[i, :n] == NEWLINE).sum())
            width = (n - cells) // height - 1 if height else 0
            # of a sliver of an image nothing may be left but its thumbnail, which is then the picture
            grid.append((height, width) if height * width else (max(height, side), side))
            row[i, :n], col[i, :n] = places(side, height, width, grid[-1])
        first = torch.tensor(views).cumsum(0) - torch.tensor(views)
        thumbnail = torch.zeros(sum(views), dtype=torch.bool).index_fill(0, first, True)
        owner = torch.arange(len(views)).repeat_interleave(torch.tensor(views))
        return Layout(
            n=lengths.tolist(), grid=grid, kind=["image"] * len(views), view=view.to(device), cell=cell.to(device),
            row=row.to(device), col=col.to(device), valid=valid.to(device), view_image=owner.to(device),
            view_grid=(side, side), tiles=tiles, thumbnail=thumbnail.to(device),
        )  # fmt: skip

    @property
    def _side(self) -> int:
        """Patches along the edge of a view."""
        return self.tower.config.image_size // self.tower.config.patch_size

    def _cut(self, given: dict[str, Any]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Size (height, width) in pixels of every image, and the (rows, columns) of the crops that it is cut into."""
        sizes, config = torch.as_tensor(given["image_sizes"]).tolist(), self.model.config
        edge = config.vision_config.image_size
        return sizes, [get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge) for size in sizes]

    def pixels(self, given: dict[str, Any]) -> Tensor | None:
        """[V, 3, H, W]: the views of all images; padding views of images with fewer crops left out."""
        pixels = super().pixels(given)
        if pixels is None or pixels.ndim == 4:
            return pixels
        counts = [1 + rows * cols for rows, cols in self._cut(given)[1]]
        return torch.cat([image[:n] for image, n in zip(pixels, counts, strict=True)])

    def check_method(self, method) -> None:
        super().check_method(method)
        self.check_strategy()

    def check_strategy(self) -> None:
        """Raise ``ValueError`` when the model feeds other rows of its tower than its patches."""
        if self.model.config.vision_feature_select_strategy != "default":
            raise ValueError(
                "This LLaVA-NeXT feeds the CLS token to the language model (vision_feature_select_strategy='full'), "
                "which compression does not handle; 'default' works."
            )


def places(side: int, height: int, width: int, grid: tuple[int, int]) -> tuple[LongTensor, LongTensor]:
    """Row and column in the picture ``grid`` of every token of one image: thumbnail, then rows of cells and newline."""
    row, col = (((torch.arange(side) * 2 + 1) * length) // (2 * side) for length in grid)
    thumbnail = row.repeat_interleave(side), col.repeat(side)
    crops = torch.arange(height).repeat_interleave(width + 1), torch.arange(width + 1).repeat(height)
    return torch.cat([thumbnail[0], crops[0]]), torch.cat([thumbnail[1], crops[1]])
