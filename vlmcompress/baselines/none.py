# SPDX-License-Identifier: Apache-2.0
"""The uncompressed model, with the ledger's numbers; and the model that sees no image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..method import Method, Stage
from ..registry import register_method
from ..views import EntryTokens, Selection


@register_method("none")
@dataclass(frozen=True)
class Uncompressed(Method):
    """Keep everything; outputs are bit-identical to the stock model's."""

    summary: ClassVar[str] = "the uncompressed model"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})


@register_method("no-vision")
@dataclass(frozen=True)
class NoVision(Method):
    """Drop every visual token: what a question can be answered with without the image.

    The tower still runs, so times and FLOPs include it.
    """

    summary: ClassVar[str] = "no visual token at all: the prior of the language model"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        images = len(tokens.layout)
        return Selection(torch.empty(images, 0, dtype=torch.long, device=tokens.rows.device), [0] * images)
