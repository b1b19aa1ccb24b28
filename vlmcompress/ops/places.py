# SPDX-License-Identifier: Apache-2.0
"""Ragged places in rectangular tensors, without making the host wait for a GPU.

A copy of a list from the host and an index by a mask each wait until the device has done everything that is queued.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..dtypes import LongTensor


def on_device(numbers: list[int], device: torch.device) -> LongTensor:
    """[len(numbers)] whole numbers on ``device``; equal ones and those of a range are made there, others are copied."""
    count = len(numbers)
    if count and numbers == [numbers[0]] * count:
        return torch.full((count,), numbers[0], dtype=torch.long, device=device)
    if count and numbers == list(range(numbers[0], numbers[0] + count)):
        return torch.arange(numbers[0], numbers[0] + count, device=device)
    return torch.tensor(numbers, dtype=torch.long, device=device)


def leading(counts: list[int], width: int, device: torch.device) -> Tensor:
    """[len(counts), width] bool: the first ``counts[i]`` places of row i."""
    return torch.arange(width, device=device) < on_device(counts, device)[:, None]


def put(table: Tensor, row: LongTensor, column: LongTensor, real: Tensor, values: Tensor) -> Tensor:
    """``table`` [B, S] with ``values`` at ``row``, ``column`` (all [I, k], or of shapes that expand to it) where ``real``."""
    width = table.shape[1]
    # what is not real lands in one spare column
    target = row * (width + 1) + torch.where(real, column, width)
    flat = pad(table, (0, 1)).flatten().scatter(0, target.flatten(), values.expand_as(target).flatten())
    return flat.view(len(table), width + 1)[:, :width]
