# SPDX-License-Identifier: Apache-2.0
"""Average pooling on token grids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dtypes import LongTensor


def pool_grid(grid: Tensor, h: int, w: int) -> Tensor:
    """Adaptive average pooling of [B, rows, cols, C] to [B, h · w, C], in fp32, returned in the input's dtype."""
    pooled = nn.functional.adaptive_avg_pool2d(grid.permute(0, 3, 1, 2).float(), (h, w))
    return pooled.flatten(2).mT.to(grid.dtype)


def bin_owner(rows: int, cols: int, h: int, w: int) -> LongTensor:
    """[rows · cols] bin (raster of h × w) that each cell falls into; cells that two bins share go to the earlier."""
    row = (torch.arange(rows) * h) // rows
    col = (torch.arange(cols) * w) // cols
    return (row[:, None] * w + col).flatten()
