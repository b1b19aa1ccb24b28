# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: SigLIP without CLS, AnyRes crops resized to a maximum behind the projector, pooled video frames."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image

from ..dtypes import LongTensor
from ..ops.pooling import Pooling, bilinear_taps, outer_taps
from ..registry import register_adapter
from ..tokens import NEWLINE, Layout
from .frames import frame_layout, frame_pooling
from .llava_next import LlavaNextAdapter, places


@register_adapter("llava_onevision")
class LlavaOnevisionAdapter(LlavaNextAdapter):
    """``LlavaOnevisionForConditionalGeneration`` with any text model that has LLaMA's layer structure.

    The only image of a prompt comes as thumbnail and crops, as in LLaVA-NeXT; where the picture that the crops form has
    more cells than ``anyres_max`` crops (by a tenth at least), the model resizes it behind the projector. A token of the
    resized picture then belongs to the crop in which its centre lies. Several images of a prompt are one view each,
    closed by a newline. The frames of a video are resized to half their side behind the projector, and one newline
    closes the video. What is resized is scored by the same resizing of what the tower gives to patches.
    """

    doors: ClassVar[dict[str, str]] = {"image": "get_image_features", "video": "get_video_features"}

    def geometry(self, given: dict[str, Any]) -> Layout:
        device, side = given["pixel_values"].device, self._side
        limit = given.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio
        most = int(limit.removeprefix("anyres_max_"))
        images = [_Image(size, tiles, side, most) for size, tiles in zip(*self._cut(given), strict=True)]
        first = torch.tensor([0, *(image.views for image in images)]).cumsum(0).tolist()
        padded = torch.nn.utils.rnn.pad_sequence
        view = padded([torch.where(i.view < 0, -1, i.view + v) for i, v in zip(images, first, strict=False)], True)
        cell, row, col = (padded([getattr(i, name) for i in images], True) for name in ("cell", "row", "col"))
        valid = padded([torch.ones_like(i.cell, dtype=torch.bool) for i in images], True)
        owner = torch.arange(len(images)).repeat_interleave(torch.tensor([i.views for i in images]))
        thumbnail = torch.zeros(first[-1], dtype=torch.bool).index_fill(0, torch.tensor(first[:-1]), True)
        pooling = _pooling(images, first, side).to(device) if any(i.resized for i in images) else None
        return Layout(
            n=[len(i.cell) for i in images], grid=[i.grid for i in images], kind=["image"] * len(images),
            view=view.to(device), cell=cell.to(device), row=row.to(device), col=col.to(device), valid=valid.to(device),
            view_image=owner.to(device), view_grid=(side, side), tiles=[i.tiles for i in images],
            thumbnail=thumbnail.to(device), pooling=pooling, projected=[side**2] * first[-1] if pooling else None,
        )  # fmt: skip

    def _cut(self, given: dict[str, Any]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """Size (height, width) of every image and the (rows, columns) of its crops, (0, 0) where it is not cut."""
        sizes, config = torch.as_tensor(given["image_sizes"]).tolist(), self.model.config
        numbers, edge = given.get("batch_num_images"), config.vision_config.image_size
        alone = [True] * len(sizes) if numbers is None else [int(n) == 1 for n in numbers for _ in range(int(n))]
        cut = [
            get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge) if single else (0, 0)
            for size, single in zip(sizes, alone, strict=True)
        ]
        return sizes, cut

    def video_geometry(self, given: dict[str, Any]) -> Layout:
        videos, frames = given["pixel_values_videos"].shape[:2]
        side, pooled = self._side, math.ceil(self._side / 2)
        line = bilinear_taps(side, pooled)
        pooling = frame_pooling(
            videos * frames, side**2, outer_taps(line, line, side), given["pixel_values_videos"].device,
            behind_projector=True,
        )  # fmt: skip
        return frame_layout(videos, frames, pooling, (pooled, pooled), newline=True)

    def check_strategy(self) -> None:
        if self.model.config.vision_feature_select_strategy != "full":
            raise ValueError(
                "This LLaVA-OneVision cuts off its first patch (vision_feature_select_strategy='default', but its tower "
                "has no CLS token); 'full' is right for it."
            )


class _Image:
    """The tokens of one image: ``view`` (counted within it) and ``cell``, ``row`` and ``col`` of each, and its picture.

    ``numbers`` [h, w]: patch, counted through the image's views, in every cell of the picture without its padding.
    """

    def __init__(self, size: list[int], tiles: tuple[int, int], side: int, most: int):
        self.tiles, self.views = tiles, 1 + tiles[0] * tiles[1]
        cells = torch.arange(side * side)
        if not tiles[0]:
            self.grid, self.resized = (side, side), False
            self.cell = torch.cat([cells, torch.tensor([NEWLINE])])
            self.view = torch.where(self.cell < 0, -1, 0)
            self.row = torch.cat([cells // side, torch.tensor([side - 1])])
            self.col = torch.cat([cells % side, torch.tensor([side])])
            return
        canvas = torch.arange(side**2, self.views * side**2).view(*tiles, side, side).transpose(1, 2)
        canvas = canvas.reshape(tiles[0] * side, tiles[1] * side)
        self.numbers = unpad_image(canvas[None], size)[0]
        box = tuple(self.numbers.shape)
        ratio = math.sqrt(box[0] * box[1] / (most * side**2))
        self.resized = ratio > 1.1
        self.grid = (int(box[0] // ratio), int(box[1] // ratio)) if self.resized else box
        lines = [_crops(*line, side) for line in zip(canvas.shape, box, self.grid, strict=True)]
        (tile_row, in_row), (tile_col, in_col) = lines
        view = 1 + tile_row[:, None] * tiles[1] + tile_col
        cell = in_row[:, None] * side + in_col
        nowhere, newline = (torch.full((self.grid[0], 1), value) for value in (-1, NEWLINE))
        self.view = torch.cat([torch.zeros_like(cells), torch.cat([view, nowhere], 1).flatten()])
        self.cell = torch.cat([cells, torch.cat([cell, newline], 1).flatten()])
        self.row, self.col = places(side, *self.grid, self.grid)


def _crops(canvas: int, box: int, length: int, side: int) -> tuple[LongTensor, LongTensor]:
    """Along one direction: the crop of each of ``length`` cells that span ``box`` of the ``canvas``, and its place there."""
    centre = (torch.arange(length) + 0.5) * (box / length) + (canvas - box) // 2
    crop = (centre // side).long()
    if length == box:
        return crop, (centre % side).long()
    # resized cells are fewer than a crop's own; they take its first places
    start = torch.searchsorted(crop, crop)
    return crop, torch.arange(length) - start


def _pooling(images: list[_Image], first: list[int], side: int) -> Pooling:
    """Every cell is its own patch, except in pictures that are resized."""
    patches = side**2
    patch = torch.zeros(first[-1] * patches, 4, dtype=torch.long)
    patch[:, 0] = torch.arange(len(patch))
    weight = torch.zeros(patch.shape).index_fill(1, torch.tensor([0]), 1.0)
    for image, view in zip(images, first, strict=False):
        if not image.resized:
            continue
        there = slice((view + 1) * patches, (view + image.views) * patches)
        patch[there], weight[there] = 0, 0.0
        height, width = image.numbers.shape
        taps, share = outer_taps(bilinear_taps(height, image.grid[0]), bilinear_taps(width, image.grid[1]), width)
        crop = image.view > 0
        target = (image.view[crop] + view) * patches + image.cell[crop]
        patch[target] = image.numbers.flatten()[taps] + view * patches
        weight[target] = share
    shape = first[-1], patches, 4
    everywhere = all(image.resized for image in images)
    return Pooling(patch.view(shape), weight.view(shape), patches, behind_projector=True, everywhere=everywhere)
