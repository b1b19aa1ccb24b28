# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX with a count for every image by what is in it (ours, not the paper's)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..method import Method, Stage
from ..ops.pool import bin_owner, target_grid
from ..pooled import pooled_images
from ..registry import register_method
from ..views import EntryTokens, Selection
from .tokenflex import check_pooled, check_projector

if TYPE_CHECKING:
    from ..adapters.base import Adapter


def detail(features: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """[I] fp32: the share of the features' variance [I, rows · cols, C] that pooling to ``target`` (h, w) averages away.

    0 for a picture that is the same everywhere inside each window, near 1 for one of fine detail only.
    """
    owner, x = bin_owner(*grid, *target).to(features.device), features.float()
    index = owner[None, :, None].expand_as(x)
    number = torch.bincount(owner, minlength=target[0] * target[1])[None, :, None]
    windows = x.new_zeros(len(x), target[0] * target[1], x.shape[2]).scatter_add(1, index, x) / number
    lost = (x - windows.gather(1, index)).square().sum((1, 2))
    whole = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
    return lost / whole.clamp_min(1e-12)


@register_method("tokenflex-adaptive")
@dataclass(frozen=True)
class AdaptiveTokenFlex(Method):
    """Give each image one of ``counts`` tokens, more the more of its detail the smallest count would average away.

    Thresholds for an average budget come from :func:`calibrate_adaptive`. Images of a batch may differ. Only for models
    whose images are one view.

    Args:
        counts: ascending; those that the model was trained at are the natural ones.
        thresholds: one fewer than ``counts``, ascending: an image gets count i when its score lies at or above
            threshold i − 1.
    """

    counts: tuple[int, ...] = (64, 144, 256)
    thresholds: tuple[float, ...] = (0.4, 0.6)

    summary: ClassVar[str] = "a TokenFLEX count for every image by its detail (calibrate the thresholds)"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})
    fixed_budget: ClassVar[bool] = False

    def validate(self) -> None:
        # a saved configuration brings lists
        object.__setattr__(self, "counts", tuple(self.counts))
        object.__setattr__(self, "thresholds", tuple(self.thresholds))
        if not self.counts or list(self.counts) != sorted(set(self.counts)) or self.counts[0] < 1:
            raise ValueError(f"counts go up from at least 1, each named once, not {self.counts!r}.")
        if len(self.thresholds) != len(self.counts) - 1 or list(self.thresholds) != sorted(self.thresholds):
            raise ValueError(
                f"{len(self.counts)} counts take {len(self.counts) - 1} thresholds that go up, not {self.thresholds!r}."
            )

    def check_family(self, adapter: Adapter) -> None:
        check_projector(self.name, adapter)
        if adapter.tiled:
            raise ValueError(f"'{self.name}' takes images of one view, and this family cuts them into tiles.")
        rows, cols = adapter.whole_projector.grid
        for count in self.counts:
            target_grid(count, rows, cols)
            if count > rows * cols:
                raise ValueError(f"A view has {rows * cols} patches, too few for {count} tokens.")

    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        check_pooled(self.name, tokens)
        grid = tokens.layout.grid[0]
        scores = detail(tokens.rows, grid, target_grid(self.counts[0], *grid))
        state["flops"] = 6 * tokens.rows.numel()
        counts = [self.counts[bisect_right(self.thresholds, score)] for score in scores.tolist()]
        if counts == tokens.layout.n:
            return None
        return pooled_images(tokens, [target_grid(count, *grid) for count in counts], tokens.pooling)


def shares_for(counts: Sequence[int], average: float) -> list[float]:
    """The shares of ``counts`` that average to ``average``, as even as they can be (those of maximal entropy).

    Raises ``ValueError`` when the average lies outside the counts.
    """
    if not counts[0] <= average <= counts[-1]:
        raise ValueError(f"An average of {average} lies outside the counts, {counts[0]} to {counts[-1]}.")

    def at(tilt: float) -> list[float]:
        powers = [tilt * (n - average) / (counts[-1] - counts[0] or 1) for n in counts]
        weights = [math.exp(p - max(powers)) for p in powers]
        return [w / sum(weights) for w in weights]

    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        mean = sum(n * p for n, p in zip(counts, at(middle), strict=True))
        low, high = (middle, high) if mean < average else (low, middle)
    return at((low + high) / 2)


@torch.no_grad()
def calibrate_adaptive(
    model: Any, samples: Sequence[Mapping[str, Any]], average: float, counts: Sequence[int] = (64, 144, 256)
) -> AdaptiveTokenFlex:
    """Thresholds with which the images of ``samples`` get ``average`` tokens on average.

    ``samples``: model inputs of a validation split (``pixel_values`` is what is read). The scores are ranked, and the
    shares of :func:`shares_for` cut the ranking. Raises ``ValueError`` without samples, for an average outside the counts
    and for a model without a TokenFLEX projector.
    """
    from ..adapters.base import adapter_for

    if not samples:
        raise ValueError("Calibration needs at least one sample with an image.")
    adapter, shares = adapter_for(model), shares_for(counts, average)
    AdaptiveTokenFlex(tuple(counts), (0.0,) * (len(counts) - 1)).check_family(adapter)
    projector, found = adapter.whole_projector, []
    target = target_grid(counts[0], *projector.grid)
    hook = projector.register_forward_pre_hook(lambda module, args: found.append(detail(args[0], module.grid, target)))
    try:
        for sample in samples:
            model.model.get_image_features(sample["pixel_values"].to(model.device, model.dtype))
    finally:
        hook.remove()
    scores = torch.cat(found).sort().values
    edges = torch.tensor(shares).cumsum(0)[:-1] * len(scores)
    thresholds = []
    for edge in edges.round().long().tolist():
        # between two neighbours, so that equal scores of another run fall on the same side
        below, above = (scores[min(max(i, 0), len(scores) - 1)] for i in (edge - 1, edge))
        thresholds.append(float((below + above) / 2) if 0 < edge < len(scores) else math.inf if edge else -math.inf)
    return AdaptiveTokenFlex(tuple(counts), tuple(thresholds))
