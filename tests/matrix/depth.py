# SPDX-License-Identifier: Apache-2.0
"""Every cell of the matrix in every way of running it, and what comes of one."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
from cells import OPTIONS, reason
from models import AHEAD
from slow import DECODINGS, check
from stories import PROMPTS, STORIES

import vlmcompress
import vlmcompress.flex
from vlmcompress.catalog import recorded

#: method, family, prompt, attention, decoding
CELLS = [
    cell
    for cell in product(OPTIONS, STORIES, PROMPTS, ("sdpa", "eager"), DECODINGS)
    if cell[2] in STORIES[cell[1]].specs
]  # fmt: skip


@cache
def built(family: str, attention: str) -> Any:
    return STORIES[family].build(attention)


def deep(method: str, family: str, prompt: str, attention: str, decoding: str) -> str:
    """ "" when every logit is the slow reference's, else why the cell is refused."""
    story = STORIES[family]
    flexible = method.startswith("tokenflex")
    model = story.build(attention) if flexible else built(family, attention)
    inputs = story.write(model, story.specs[prompt])
    pixels, rows = inputs.get("pixel_values"), len(inputs["input_ids"])
    if decoding == "beams" and not AHEAD and pixels is not None and pixels.ndim > 2 and len(pixels) != rows:
        pytest.skip("beams of this transformers mix up the views of a prompt, with a method and without")
    try:
        if flexible:
            vlmcompress.flex.install(model, counts=(4, 9))
        check(model, method, OPTIONS[method], inputs, decoding, story.special)
    except ValueError as refusal:
        return reason(refusal, method, model)
    return ""


def expected(method: str, family: str, prompt: str, attention: str, decoding: str) -> str:
    """What ``vlmcompress.support`` and ``docs/support.md`` say of the cell."""
    return recorded()[method][f"{family} video" if prompt == "video" else family]
