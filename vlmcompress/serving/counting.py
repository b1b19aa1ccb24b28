# SPDX-License-Identifier: Apache-2.0
"""How many tokens a method keeps of an image, from the image's geometry alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from ..method import Composition
from .half import twin
from .settings import uncertain
from .tokens import VisualEncoder

#: images that are counted at once at the start: what they show must not matter
_FIRST = 8


class TokenCounter:
    """Counts by running the method on a narrow twin of the model's tower, which has the model's own geometry.

    No formula of a method is written a second time, so methods of other packages are counted too. Raises ``ValueError``
    for a method that cannot be served on this family.
    """

    def __init__(self, config: PreTrainedConfig, method: Composition):
        self._encoder = VisualEncoder(twin(config), method)
        self._noise, first, self._copies = _FAMILIES[config.model_type]
        self._count = lru_cache(maxsize=8192)(self._run)
        for shape in first(config):
            self._run(*shape, copies=_FIRST)

    def __call__(self, *shape: int) -> int:
        """Tokens kept of one image.

        ``shape``: nothing where every image has one view; (height, width) in pixels where it is cut into tiles by its
        size (LLaVA-NeXT, LLaVA-OneVision); the number of views (InternVL); or the grid of patches (t, h, w) (Qwen).

        Raises ``ValueError`` when images of one geometry differ in number, and for a budget that an image of this
        geometry cannot meet.
        """
        return self._count(*shape)

    def _run(self, *shape: int, copies: int = 0) -> int:
        # the caller's random numbers stay as they are
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            given = self._noise(self._encoder.model.config, copies or self._copies, *shape)
            counts = {len(tokens) for tokens in self._encoder(given)}
        if len(counts) != 1:
            raise uncertain(self._encoder.method)
        if counts == {0}:
            raise ValueError(f"'{self._encoder.method.name}' keeps no token of an image; send prompts without images.")
        return counts.pop()


def _views(copies: int, number: int, height: int, width: int) -> Tensor:
    """[copies, number, 3, height, width]: noise everywhere, in the upper rows only, in the left columns only, ..."""
    pixels = torch.randn(copies, number, 1, height, width)
    pixels[1::3, ..., height // 4 :, :] = 0.0
    pixels[2::3, ..., width // 4 :] = 0.0
    return pixels.expand(-1, -1, 3, -1, -1)


def _one_view(config: Any, copies: int) -> dict[str, Any]:
    edge = config.vision_config.image_size
    return {"pixel_values": _views(copies, 1, edge, edge).flatten(0, 1)}


def _cut_by_size(config: Any, copies: int, height: int, width: int) -> dict[str, Any]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    edge = config.vision_config.image_size
    views = image_size_to_num_patches([height, width], config.image_grid_pinpoints, edge)
    return {
        "pixel_values": _views(copies, views, edge, edge),
        "image_sizes": torch.tensor([[height, width]] * copies),
        # LLaVA-OneVision cuts into tiles what is the only image of its prompt
        **({"batch_num_images": torch.ones(copies, dtype=torch.long)} if "onevision" in config.model_type else {}),
    }


def _stacked(config: Any, copies: int, views: int) -> dict[str, Any]:
    height, width = config.vision_config.image_size
    return {
        "pixel_values": _views(copies, views, height, width).flatten(0, 1),
        "placeholders": runs([views * config.image_seq_length] * copies),
    }


def _packed(config: Any, copies: int, t: int, h: int, w: int) -> dict[str, Any]:
    vision = config.vision_config
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = _views(copies, t, h, w)[:, :, 0].flatten()[:, None] + torch.randn(8)
    return {
        "pixel_values": pixels.repeat(1, -(-channels // 8))[:, :channels],
        "image_grid_thw": torch.tensor([[t, h, w]] * copies),
    }


def runs(lengths: list[int]) -> Tensor:
    """[1, S] bool: runs of these ``lengths``, one unmarked column behind each."""
    return torch.cat([torch.arange(n + 1) < n for n in lengths])[None]


def _cuts(config: Any) -> list[tuple[int, ...]]:
    """A size that is cut into whole tiles, and one whose tiles hold padding."""
    height, width = max(config.image_grid_pinpoints[:4], key=lambda size: size[0] * size[1])
    return [(height, width), (height * 3 // 5, width)]


#: by family: noise images of a geometry, the geometries that are tried first, and how many images count a later one
_FAMILIES: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[Any], list[tuple[int, ...]]], int]] = {
    "llava": (_one_view, lambda config: [()], 1),
    "llava_next": (_cut_by_size, _cuts, 3),
    "llava_onevision": (_cut_by_size, _cuts, 3),
    "internvl": (_stacked, lambda config: [(1,), (5,)], 1),
    "qwen2_5_vl": (_packed, lambda config: [(1, 16, 24)], 1),
    "qwen3_vl": (_packed, lambda config: [(1, 16, 24)], 1),
}
