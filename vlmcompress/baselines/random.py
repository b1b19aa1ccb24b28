# SPDX-License-Identifier: Apache-2.0
"""Random choice: the first baseline that a method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
        scores = tokens.noise(self.seed).masked_fill(~tokens.layout.valid, float("-inf"))
        return tokens.select(scores, self.keep)
