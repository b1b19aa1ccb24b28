# SPDX-License-Identifier: Apache-2.0
"""Three-dimensional positions of the images' tokens that were kept: pure functions.

vLLM asks for a prompt's positions before it has seen the images. Those of the text follow from the images' sizes alone and
are exact at once; where a kept token of an image lies travels with its embedding and is written down when it comes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: channels that travel with an embedding: time, row and column, each as two digits
CHANNELS = 6
#: base of the digits: bfloat16 holds whole numbers up to 256 exactly
_BASE = 128


def with_places(embedding: Tensor, place: Tensor) -> Tensor:
    """[k, C] embeddings and [k, 3] places (t, h, w) inside their image → [k, C + CHANNELS]. Exact below 16,384."""
    digits = torch.stack([place // _BASE, place % _BASE], dim=-1).flatten(1)
    return torch.cat([embedding, digits.to(embedding)], dim=1)


def split_places(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The way back: [k, C] embeddings and [k, 3] places."""
    high, low = embedding[:, -CHANNELS:].long().unflatten(1, (3, 2)).unbind(-1)
    return embedding[:, :-CHANNELS], high * _BASE + low


def text_positions(length: int, images: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Positions [3, length] of a prompt, exact for its text, and how far decoding lies behind the prompt's length.

    ``images``: (first placeholder, placeholders, extent) of every image, ascending; an image's extent is the largest of
    its grid's sides, and what follows it goes on behind that. Placeholders all get the position their image starts at.
    """
    positions = torch.empty(length, dtype=torch.long)
    end = position = 0
    for start, count, extent in images:
        positions[end:start] = torch.arange(position, position + start - end)
        position += start - end
        positions[start : start + count] = position
        position, end = position + extent, start + count
    positions[end:] = torch.arange(position, position + length - end)
    return positions.expand(3, -1).clone(), position - end


def placed(positions: Tensor, placeholder: Tensor, computed: int, places: Sequence[Tensor]) -> Tensor:
    """``positions`` [3, N] with those of the placeholders behind the first ``computed`` tokens that ``places`` names.

    ``placeholder`` [N] bool. ``places``: [k_i, 3] for the images that the present chunk of the prompt reaches, in order:
    all or a part of each image's rows. Images have text between them.
    """
    if not places:
        return positions
    here = placeholder.nonzero()[:, 0]
    here = here[here >= computed][: sum(map(len, places))]
    # the last text in front of every image; -1 where the prompt starts with it
    text = torch.where(placeholder, -1, torch.arange(len(placeholder), device=placeholder.device)).cummax(0).values
    before = text[here]
    base = torch.where(before < 0, 0, positions[0, before.clamp_min(0)] + 1)
    changed = positions.clone()
    changed[:, here] = (torch.cat(list(places)).to(base) + base[:, None]).T
    return changed
