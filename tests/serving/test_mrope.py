# SPDX-License-Identifier: Apache-2.0
"""Positions of kept tokens: exact against those of the whole prompt, wherever its chunks end."""

from __future__ import annotations

import pytest
import torch

from vlmcompress.serving.vllm.mrope import placed, split_places, text_positions, with_places

IMAGE = 7


def whole(parts) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Positions [3, N] of a full prompt of texts (int) and images (rows, columns), as M-RoPE defines them; and each part."""
    found, position = [], 0
    for part in parts:
        if isinstance(part, int):
            found.append(torch.arange(position, position + part).expand(3, -1))
            position += part
            continue
        h, w = part
        row, col = torch.arange(h).repeat_interleave(w), torch.arange(w).repeat(h)
        found.append(torch.stack([torch.zeros_like(row), row, col]) + position)
        position += max(h, w)
    return torch.cat(found, 1), found


PROMPTS = [[4, (3, 5), 6], [4, (5, 3), 2, (2, 2), 3], [1, (4, 4), 1, (1, 6), 1, (6, 1), 5], [(2, 3), 4]]


@pytest.mark.parametrize("parts", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8, 64])
def test_positions_are_those_of_the_survivors(parts, chunk):
    generator = torch.Generator().manual_seed(len(parts))
    full, pieces = whole(parts)
    ids, expected, places, images = [], [], [], []
    for part, piece in zip(parts, pieces, strict=True):
        if isinstance(part, int):
            ids += [1] * part
            expected.append(piece)
            continue
        kept = torch.randperm(piece.shape[1], generator=generator)[: max(1, piece.shape[1] // 2)].sort().values
        images.append((len(ids), len(kept), max(part)))
        ids += [IMAGE] * len(kept)
        expected.append(piece[:, kept])
        places.append((piece[:, kept] - piece[:, :1]).T)
    expected = torch.cat(expected, 1)
    ids = torch.tensor(ids)
    positions, delta = text_positions(len(ids), images)
    assert delta == int(full.max()) + 1 - len(ids)
    assert torch.equal(positions[:, ids != IMAGE], expected[:, ids != IMAGE])
    for again in range(2):  # a request that was pushed out runs again
        for start in range(0, len(ids), chunk):
            end = min(start + chunk, len(ids))
            reached = []
            for (first, n, _), place in zip(images, places, strict=True):
                low, high = max(start, first), min(end, first + n)
                if low < high:
                    reached.append(place[low - first : high - first])
            positions = placed(positions, ids == IMAGE, start, reached)
            assert torch.equal(positions[:, :end], expected[:, :end]), again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_survive_the_embedding(dtype):
    place = torch.tensor([[0, 0, 0], [1, 127, 128], [0, 300, 16383]])
    embedding = torch.randn(3, 5).to(dtype)
    rows, found = split_places(with_places(embedding, place))
    assert torch.equal(rows, embedding) and torch.equal(found, place)
