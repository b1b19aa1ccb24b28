# SPDX-License-Identifier: Apache-2.0
"""How strongly a module changes each token: the transition weight of TransPrune."""

from __future__ import annotations

import torch
from torch import Tensor


def transition_scalars(x: Tensor, y: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Relative magnitude and cosine of a module's output against its input, token by token.

    Args:
        x, y: [B, S, D] what the module read and what it returned.
        chunk: tokens that are brought to fp32 at a time where the model's dtype is another.

    Returns:
        ‖y‖ / ‖x‖ and cos(x, y), both [B, S] fp32.
    """
    magnitudes, cosines = [], []
    for a, b in zip(x.split(chunk, dim=1), y.split(chunk, dim=1), strict=True):
        a, b = a.float(), b.float()
        before, after = a.norm(dim=-1), b.norm(dim=-1)
        dot = torch.einsum("bsd,bsd->bs", a, b)
        magnitudes.append(after / before)
        cosines.append(dot / (before.clamp_min(1e-8) * after.clamp_min(1e-8)))
    return torch.cat(magnitudes, 1), torch.cat(cosines, 1)


def transition_weight(
    magnitude: Tensor, cosine: Tensor, valid: Tensor | None = None, *, absolute: bool = False
) -> Tensor:
    """Transition weight of every token: its magnitude times the softmax of ``1 - cosine`` over the sample's tokens.

    Args:
        magnitude, cosine: [B, S] fp32 from :func:`transition_scalars`.
        valid: [B, S] real tokens or None for all; padding takes no part in the softmax and gets 0.
        absolute: use ``1 - |cosine|``.

    Returns:
        [B, S] fp32.
    """
    turn = 1 - (cosine.abs() if absolute else cosine)
    if valid is None:
        return magnitude * turn.softmax(-1)
    # a row without any real token would be all NaN otherwise; its zeros are never read
    weight = magnitude * turn.masked_fill(~valid, torch.finfo(turn.dtype).min).softmax(-1)
    return weight.masked_fill(~valid, 0.0)
