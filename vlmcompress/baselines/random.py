# SPDX-License-Identifier: Apache-2.0
"""Random choice: the first baseline that a method has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import Method, Stage, check_keep
from ..registry import register_method
from ..views import EntryTokens, Selection


@register_method("random")
@dataclass(frozen=True)
class Random(Method):
    """Keep tokens drawn uniformly without replacement.

    The draw depends on ``seed`` and on the image's own pixels, so an image gets the same tokens alone and in any batch.

    Args:
        keep: visual tokens per image, or their share.
        seed: of the draw; tables report at least three.
    """

    keep: int | float = 64
    seed: int = 0

    summary: ClassVar[str] = "tokens drawn at random (seeded per image)"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def validate(self) -> None:
        check_keep(self.keep)

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        layout = tokens.layout
        scores = torch.full(layout.cell.shape, float("-inf"))
        for image, n in enumerate(layout.n):
            generator = torch.Generator().manual_seed(self.seed + (self._digest(tokens, image) << 16))
            scores[image, :n] = torch.rand(n, generator=generator)
        return tokens.select(scores.to(layout.cell.device), self.keep)

    @staticmethod
    def _digest(tokens: EntryTokens, image: int) -> int:
        """Number that identifies the image's pixels."""
        pixels = tokens.pixels_of(image)
        return 0 if pixels is None else zlib.crc32(pixels.float().cpu().numpy().tobytes())
