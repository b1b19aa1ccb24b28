# SPDX-License-Identifier: Apache-2.0
"""InternVL: square tiles and a thumbnail, InternViT with a CLS token, a pixel shuffle in front of the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dtypes import LongTensor
from ..registry import register_adapter
from ..tokens import Layout
from .base import Adapter
from .labels import numbered_frames
from .raster import raster_blocks
from .tiling import VIDEO, runs, tiled_layout


@register_adapter("internvl")
class InternVLAdapter(Adapter):
    """``InternVLForConditionalGeneration``.

    The pixel shuffle joins the patches of a block of 2 × 2 to one token; tokens stand in raster order, view by view, the
    thumbnail last. The model gets the views of all images in one stack and is told neither which image they belong to
    nor how its tiles lie. The first shows in the prompt, where the placeholders of one image form one run. Of the
    arrangements that a number of tiles allows, the one whose picture is most like the thumbnail is taken, which both
    show in full. Without a prompt (features made ahead of it) every view counts as an image of its own.

    The frames of a video come as views too, each in a run of its own behind a line that numbers it ("Frame2: "), by which
    they are known; a prompt that numbers uncut images in exactly that form has a video of them.
    """

    joins_patches = True
    plain_views = True
    tiled = True
    reads_prompt = True

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layer

    @property
    def tower_prefix(self) -> int:
        return 1

    @property
    def tower_heads(self) -> int:
        return self.tower_layers[0].attention.num_heads

    @property
    def tower_qk_norm(self) -> bool:
        return self.tower.config.use_qk_norm

    @property
    def tower_scale(self) -> float:
        return self.tower_layers[0].attention.scale

    @property
    def side(self) -> int:
        """Patches that the pixel shuffle joins along each axis."""
        return round(1 / self.model.config.downsample_ratio)

    @property
    def patches_per_token(self) -> int:
        return self.side**2

    def tower_norm(self, index: int) -> nn.Module:
        return self.tower_layers[index].layernorm_before

    def tower_masked(self, index: int) -> nn.Module:
        return self.tower_layers[index].attention

    def tower_projections(self, index: int) -> dict[str, nn.Module]:
        attention = self.tower_layers[index].attention
        return {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}

    def split_qkv(self, index: int, taps: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.tower_layers[index].attention
        parts = attention.q_norm(taps["q"]), attention.k_norm(taps["k"]), taps["v"]
        q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in parts)
        return q, k, v

    def position_arguments(self, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        return {}

    def patch_order(self, grid: tuple[int, int]) -> LongTensor:
        return raster_blocks(grid, self.side)

    # geometry ---------------------------------------------------------------------------------------------------
    def geometry(self, given: dict[str, Any]) -> Layout:
        pixels, patch = given["pixel_values"], self.tower.config.patch_size
        grid = self.token_grid(tuple(pixels.shape[2 + axis] // patch[axis] // self.side for axis in (0, 1)))
        views = self._views(given.get("placeholders"), len(pixels), grid[0] * grid[1])
        tiles, pieces = [], list(pixels.split(views))
        for n in self._frames(given, views, grid[0] * grid[1]):
            tiles.append((VIDEO, n) if n > 1 else arrangement(pieces[0]))
            del pieces[:n]
        return tiled_layout(tiles, grid, pixels.device)

    @staticmethod
    def _frames(given: dict[str, Any], views: list[int], cells: int) -> list[int]:
        """Number of runs that make each image (1) or video, where the prompt can be read."""
        ids, marked = given.get("input_ids"), given.get("placeholders")
        if ids is None or marked is None:
            return [1] * len(views)
        rows = zip(ids.tolist(), marked, strict=True)
        return [n for row, here in rows for n in numbered_frames(row, runs(here), cells)]

    @staticmethod
    def _views(placeholders: Tensor | None, views: int, cells: int) -> list[int]:
        """Number of views of each run of placeholders."""
        if placeholders is None:
            return [1] * views
        lengths = [length for row in placeholders for _, length in runs(row)]
        if sum(lengths) != views * cells or any(length % cells for length in lengths):
            raise ValueError(
                f"The prompt has {sum(lengths)} image placeholders in runs of {', '.join(map(str, lengths))}, but its "
                f"{views} views make {cells} visual tokens each; build the prompt with the model's processor."
            )
        return [length // cells for length in lengths]

    def check_method(self, method) -> None:
        super().check_method(method)
        if self.model.config.vision_feature_select_strategy != "default":
            raise ValueError(
                "This InternVL feeds the CLS token to the language model (vision_feature_select_strategy='full'), which "
                "compression does not handle; 'default' works."
            )


def arrangement(views: Tensor) -> tuple[int, int]:
    """(rows, columns) of the tiles in ``views`` [n, 3, H, W], whose last one is the thumbnail; (0, 0) for one view."""
    tiles, thumbnail = views[:-1], views[-1].float()
    n = len(tiles)
    if not n:
        return 0, 0
    size = tuple(length // 4 for length in thumbnail.shape[1:])
    small = nn.functional.adaptive_avg_pool2d(thumbnail, size)
    found = [(rows, n // rows) for rows in range(1, n + 1) if n % rows == 0]
    distances = []
    for rows, cols in found:
        picture = tiles.float().unflatten(0, (rows, cols)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        distances.append((nn.functional.adaptive_avg_pool2d(picture, size) - small).square().mean())
    return found[int(torch.stack(distances).argmin())]
