# SPDX-License-Identifier: Apache-2.0
"""A budget of tokens split over the frames of a video, and frames resized to their share (QuoTA, arXiv 2503.08689).

Written from the paper and a description of the released code, which has no licence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import LongTensor
from .pool import pool_grid
from .select import largest_remainder

VERSIONS = ("v1", "v2", "v3", "v4", "v5")


def sampled_frames(native: int, seconds: float, *, base: int = 96, extra: int = 64) -> LongTensor:
    """[T] numbers of the frames to look at, T = ``base`` + ``extra`` per hour (rounded down), evenly from first to last.

    A video of fewer ``native`` frames than that shows some of them more than once.
    """
    count = base + math.floor(seconds / 3600 * extra)
    return torch.linspace(0, native - 1, count, dtype=torch.float64).long()


def frame_weights(p: Tensor, exponent: float = 2.0) -> Tensor:
    """[T] fp64 shares in proportion to ``p`` ** ``exponent``, adding up to one; all equal where no ``p`` is above zero.

    A score that is no number counts as zero.
    """
    # the factor cancels but for the last digit, which the released code's rounding down can show
    weight = (100 * p.double().nan_to_num(0.0, 0.0, 0.0).clamp_min(0)) ** exponent
    total = weight.sum()
    return weight / total if total > 0 else torch.full_like(weight, 1 / len(weight))


def cap_once(weights: Tensor, cap: float) -> Tensor:
    """[T] shares after the released code's pass over them: excess over ``cap`` goes to later ones, from left to right.

    It depends on the order of the frames, and the sum ends at or below one; :func:`split_budget` loses nothing.
    """
    capped = weights.clamp_max(cap).tolist()
    excess, total = float((weights - cap).clamp_min(0).sum()), sum(capped)
    for i, weight in enumerate(weights.tolist()):
        if weight >= cap or excess <= 0:
            continue
        grown = capped[i] + capped[i] / total * excess
        excess += max(0.0, grown - cap)
        capped[i] = min(grown, cap)
    return torch.tensor(capped, dtype=weights.dtype, device=weights.device)


def split_budget(weights: Tensor, budget: int, cap: int | None = None) -> list[int]:
    """Tokens of every frame: whole numbers in proportion to ``weights`` [T] that add up to ``budget`` exactly.

    ``cap``: most tokens of one frame; what a full frame cannot take goes to the others in proportion (water-filling),
    so that the sum is min(budget, T · cap).
    """
    most = budget if cap is None else cap
    return largest_remainder(weights.tolist(), min(budget, most * len(weights)), [most] * len(weights))


def truncated_budget(weights: Tensor, budget: int) -> list[int]:
    """Tokens of every frame as the released code counts them: rounded down, the remainder is lost."""
    return (budget * weights).floor().long().tolist()


def grid_of(count: int) -> tuple[int, int]:
    """(h, w) of the grid for ``count`` tokens: the largest square, one row taller where that fits; (0, 0) for none."""
    side = math.isqrt(max(0, count))
    taller = side * side < count and side * (side + 1) <= count
    return (side + 1 if taller else side), side


def filled_grids(counts: Sequence[int], cap: int | None = None) -> list[tuple[int, int]]:
    """Grids of all frames, with what their shapes leave over spent on others (ours).

    Of the frames whose next larger grid still fits the sum of ``counts``, the one that is shortest of its own count in
    proportion grows, ties to the earliest, until none fits. ``cap``: most tokens of one frame.
    """
    grids = [grid_of(count) for count in counts]
    left = sum(counts) - sum(h * w for h, w in grids)
    while left > 0:
        steps = []
        for i, (h, w) in enumerate(grids):
            larger = (h + 1, w) if h == w and h else (h, w + 1) if h else (1, 1)
            cells = larger[0] * larger[1]
            if counts[i] and cells - h * w <= left and (cap is None or cells <= cap):
                steps.append((cells / counts[i], i, larger))
        if not steps:
            break
        _, i, larger = min(steps)
        left -= larger[0] * larger[1] - grids[i][0] * grids[i][1]
        grids[i] = larger
    return grids


def resize_bilinear(grid: Tensor, h: int, w: int) -> Tensor:
    """Bilinear resize of [B, rows, cols, C] to [B, h · w, C] (corners not aligned, no antialias), in fp32 inside."""
    planes = grid.permute(0, 3, 1, 2).float()
    return torch.nn.functional.interpolate(planes, size=(h, w), mode="bilinear").flatten(2).mT.to(grid.dtype)


def subsampled(n: int, k: int) -> LongTensor:
    """[k] token numbers evenly from first to last of ``n``, rounded down (of fp32 places, as in the released code)."""
    return torch.linspace(0, n - 1, k, dtype=torch.float32).long()


def merge_down(x: Tensor, k: int) -> Tensor:
    """Merge [B, n, C] tokens to [B, k, C] by rounds of bipartite matching, in fp32, returned in the input's dtype.

    In every round the even tokens that are most like an odd one (cosine) join it, at most half of all, and joined groups
    are averaged with equal weights, whatever they stood for before. What is left of the even tokens comes first, by
    falling likeness, then the odd ones: the order in space is lost.
    """
    rows = x.float()
    while rows.shape[1] > k:
        n = rows.shape[1]
        r = min(n - k, n // 2)
        unit = torch.nn.functional.normalize(rows, dim=-1)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].mT).max(-1)
        order = best.argsort(dim=1, descending=True, stable=True)
        even, odd = rows[:, ::2], rows[:, 1::2]
        even = even.gather(1, order[..., None].expand_as(even))
        target = partner.gather(1, order[:, :r])[..., None].expand(-1, -1, rows.shape[-1])
        merged = odd.scatter_reduce(1, target, even[:, :r], "mean", include_self=True)
        rows = torch.cat([even[:, r:], merged], 1)
    return rows.to(x.dtype)


def resize_frame(frame: Tensor, count: int, version: str = "v1", grid: tuple[int, int] | None = None) -> Tensor:
    """[n', C] what is left of one frame [rows, cols, C] for ``count`` tokens (at least one).

    Versions of the released code: "v1" bilinear resize and "v2" average pooling to ``grid`` (default: :func:`grid_of`),
    "v3" evenly spaced tokens, "v4" merging (:func:`merge_down`), "v5" merging inside each row, then inside each column,
    to ``grid``. "v3" and "v4" give exactly ``count`` tokens (at most what there are). Raises ``ValueError`` for another
    version or no token.
    """
    if version not in VERSIONS:
        raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {version!r}.")
    if count < 1:
        raise ValueError(f"A frame that stays has at least one token, not {count}.")
    rows, cols, _ = frame.shape
    if version == "v3":
        return frame.flatten(0, 1)[subsampled(rows * cols, count).to(frame.device)]
    if version == "v4":
        return merge_down(frame.flatten(0, 1)[None], count)[0]
    h, w = grid or grid_of(count)
    if version == "v5":
        narrow = merge_down(frame, w)
        return merge_down(narrow.transpose(0, 1), h).transpose(0, 1).flatten(0, 1)
    return (resize_bilinear if version == "v1" else pool_grid)(frame[None], h, w)[0]


def with_newlines(rows: Tensor, grid: tuple[int, int], newline: Tensor) -> Tensor:
    """[h · (w + 1), C] one frame's ``rows`` [h · w, C] with ``newline`` [C] after each row of its grid."""
    h, _ = grid
    lines = rows.unflatten(0, grid)
    return torch.cat([lines, newline.to(rows).expand(h, 1, -1)], 1).flatten(0, 1)
