# SPDX-License-Identifier: Apache-2.0
"""SmolVLM and Idefics3: tiles between text tokens and a thumbnail, SigLIP, a pixel shuffle in front of one Linear."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import LongTensor
from ..registry import register_adapter
from ..tokens import Layout
from .base import Adapter
from .labels import timed_frames
from .raster import raster_blocks
from .tiling import VIDEO, runs, tiled_layout


@register_adapter("idefics3")
class Idefics3Adapter(Adapter):
    """``Idefics3ForConditionalGeneration``; the tower has no CLS token.

    The pixel shuffle joins the patches of a square block to one token. Every view is a run of placeholders behind two
    tokens, one that is the same for all and one that names the tile or the thumbnail, which is an image's last view; a
    line break ends every row of tiles. So the prompt, and only the prompt, tells which views belong together and how
    they lie. Where it does not look like that (or is not known) every view counts as an image of its own.
    """

    joins_patches = True
    tiled = True
    reads_prompt = True

    @property
    def language_model(self) -> nn.Module:
        return self.inner.text_model

    @property
    def tower(self) -> nn.Module:
        return self.inner.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.inner.connector.modality_projection

    @property
    def tower_prefix(self) -> int:
        return 0

    @property
    def feature_layer(self) -> int:
        return len(self.tower_layers) - 1

    @property
    def side(self) -> int:
        """Patches that the pixel shuffle joins along each axis."""
        return self.model.config.scale_factor

    @property
    def patches_per_token(self) -> int:
        return self.side**2

    def position_arguments(self, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        return {"patch_attention_mask": torch.ones(len(pixels), *grid, dtype=torch.bool, device=pixels.device)}

    def patch_order(self, grid: tuple[int, int]) -> LongTensor:
        return raster_blocks(grid, self.side)

    # geometry ---------------------------------------------------------------------------------------------------
    def geometry(self, given: dict[str, Any]) -> Layout:
        pixels, step = given["pixel_values"], self.tower.config.patch_size * self.side
        real = self._real(pixels)
        mask = given.get("pixel_attention_mask")
        if mask is not None and not bool(mask.bool().flatten(2).all(2)[real].all()):
            raise ValueError("Views with padding inside are not compressed; full tiles, the processor's default, are.")
        grid = (pixels.shape[3] // step, pixels.shape[4] // step)
        placeholders, ids, cells = given.get("placeholders"), given.get("input_ids"), grid[0] * grid[1]
        tiles: list[tuple[int, int]] = []
        for row, views in enumerate(real.sum(1).tolist()):
            found = [] if placeholders is None or ids is None else runs(placeholders[row])
            starts = [start + cells * i for start, length in found for i in range(length // cells)]
            known = starts and len(starts) == views
            tiles += self._read(ids[row].tolist(), starts, cells) if known else [(0, 0)] * views
        return tiled_layout(tiles, grid, pixels.device)

    def _read(self, ids: list[int], starts: list[int], cells: int) -> list[tuple[int, int]]:
        """(rows, columns) of the tiles of each image in one prompt; ``starts``: the first column of every view."""
        return arrangements(ids, starts, cells)

    @staticmethod
    def _real(pixels: Tensor) -> Tensor:
        """[B, M] bool: views that are no padding, which is all zeros."""
        return (pixels != 0).flatten(2).any(2)

    def pixels(self, given: dict[str, Any]) -> Tensor:
        pixels = given["pixel_values"]
        return pixels[self._real(pixels)]


@register_adapter("smolvlm")
class SmolVLMAdapter(Idefics3Adapter):
    """``SmolVLMForConditionalGeneration``, built like Idefics3; frames behind their times ("Frame from 00:01:") are a video."""

    def _read(self, ids: list[int], starts: list[int], cells: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        images: list[int] = []
        for n in timed_frames(ids, starts, cells):
            here, starts = starts[:n], starts[n:]
            if n > 1:
                found += [*arrangements(ids, images, cells), (VIDEO, n)]
            images = [*images, *here] if n == 1 else []
        return found + arrangements(ids, images, cells)


def arrangements(ids: list[int], starts: list[int], cells: int) -> list[tuple[int, int]]:
    """(rows, columns) of the tiles of each image in one prompt, (0, 0) for an uncut one.

    ``starts``: the first column of every view in ``ids``, ``cells`` its placeholders. All or nothing: a prompt that
    departs from the processor's pattern anywhere is read as views that are images of their own.
    """
    single = [(0, 0)] * len(starts)
    if not starts or starts[0] < 2:
        return single
    marks = [(ids[start - 2], ids[start - 1]) for start in starts]
    opening, thumbnail = marks[-1]
    if any(mark[0] != opening for mark in marks):
        return single
    found, first = [], 0
    for view, (_, name) in enumerate(marks):
        if name != thumbnail:
            continue
        tiles = _rows_of([marks[i][1] for i in range(first, view)], starts[first : view + 1], cells)
        if tiles is None:
            return single
        found.append(tiles)
        first = view + 1
    return found


def _rows_of(names: list[int], starts: list[int], cells: int) -> tuple[int, int] | None:
    """(rows, columns) of one image whose tiles are called ``names``, its thumbnail last in ``starts``; None: no such."""
    if not names:
        return 0, 0
    gaps = [b - a - cells for a, b in pairwise(starts)]
    cols = next((i for i, gap in enumerate(gaps, 1) if gap > 2), 0)
    expected = [2 if (i + 1) % cols else 3 for i in range(len(gaps) - 1)] if cols else []
    regular = cols and len(names) % cols == 0 and gaps[:-1] == expected and gaps[-1] in (3, 4)
    return (len(names) // cols, cols) if regular and len(set(names)) == len(names) else None
