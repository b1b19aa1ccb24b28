# SPDX-License-Identifier: Apache-2.0
"""How a model pools the patches of its tower into fewer tokens, as a table of weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dtypes import LongTensor


@dataclass
class Pooling:
    """Every cell is a weighted sum of K patches.

    ``patch`` [V, N, K]: their numbers, counted through all views of a pass; ``weight`` [V, N, K] fp32, zero where a cell
    has fewer (or does not exist). ``patches``: number of a view's patches in the tower. ``behind_projector``: the model
    pools what the projector has made of the patches (True) or what the projector takes (False). ``everywhere``: False when
    some of the images of the pass are not pooled.
    """

    patch: LongTensor
    weight: Tensor
    patches: int
    behind_projector: bool
    everywhere: bool = True

    def to(self, device: torch.device) -> Pooling:
        return replace(self, patch=self.patch.to(device), weight=self.weight.to(device))

    def __call__(self, per_patch: Tensor) -> Tensor:
        """[V, patches] or [V, patches, C] → [V, N] or [V, N, C], fp32 sums in the input's dtype."""
        flat = per_patch.flatten(0, 1)
        total = torch.zeros(*self.patch.shape[:2], *flat.shape[1:], device=flat.device)
        # one of the K at a time, so that no tensor of K times the features is formed
        for patch, weight in zip(self.patch.unbind(-1), self.weight.unbind(-1), strict=True):
            total += flat[patch].float() * weight.reshape(*weight.shape, *[1] * (flat.ndim - 1))
        return total.to(per_patch.dtype)


def bilinear_taps(size: int, target: int) -> tuple[LongTensor, Tensor]:
    """Neighbours [target, 2] and weights [target, 2] of a line of ``size`` cells resized to ``target``.

    As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` takes them, without antialiasing.
    """
    at = ((torch.arange(target, dtype=torch.float32) + 0.5) * (size / target) - 0.5).clamp_min(0)
    low = at.long().clamp_max(size - 1)
    high = (low + 1).clamp_max(size - 1)
    share = at - low
    return torch.stack([low, high], -1), torch.stack([1 - share, share], -1)


def outer_taps(
    rows: tuple[LongTensor, Tensor], cols: tuple[LongTensor, Tensor], width: int
) -> tuple[LongTensor, Tensor]:
    """Raster numbers and weights [h · w, K] in a picture ``width`` wide, from those of its rows [h, k] and columns [w, k']."""
    number = rows[0][:, None, :, None] * width + cols[0][None, :, None, :]
    weight = rows[1][:, None, :, None] * cols[1][None, :, None, :]
    return number.flatten(2).flatten(0, 1), weight.flatten(2).flatten(0, 1)
