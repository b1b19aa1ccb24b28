# SPDX-License-Identifier: Apache-2.0
"""What a greedy choice of spread-out tokens (ToDRE, stage 1) costs by the width of the features, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..ops.diversity import diverse_order, thin_product, unit_vectors
from .latency import Timing, interleaved, milliseconds


@dataclass(frozen=True)
class Shape:
    """What is timed; default: a tenth of the five views of LLaVA-NeXT, for a batch of four.

    ``widths`` of the features: 4,096 is what the language model of 7B takes.
    """

    images: int = 4
    tokens: int = 2880
    kept: int = 288
    widths: tuple[int, ...] = (128, 256, 512, 1024, 4096)

    def __str__(self) -> str:
        return f"{self.kept} of {self.tokens} tokens in each of {self.images} images, features in 60 clusters, float32"


def features(shape: Shape, width: int, device: str) -> Tensor:
    """[images, tokens, width] in clusters and with a common direction, as projected tokens are."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, width, generator=generator)
    pick = torch.randint(60, (shape.images, shape.tokens), generator=generator)
    noise = torch.randn(shape.images, shape.tokens, width, generator=generator)
    return (centres[pick] + 0.5 * noise + 0.3).to(device)


def step_by_step(x: Tensor, pivot: LongTensor, steps: int) -> LongTensor:
    """[B, steps] the max-sum order as the paper states it: one product of all tokens with the last chosen one per step."""
    unit, row = unit_vectors(x), torch.arange(len(x), device=x.device)
    score, order = x.new_zeros(x.shape[:2]), [pivot]
    while len(order) < steps:
        score += torch.bmm(unit, unit[row, order[-1]].unsqueeze(2)).squeeze(2)
        score[row, order[-1]] = torch.inf
        order.append(score.argmin(1))
    return torch.stack(order, 1)


@torch.no_grad()
def selection(shape: Shape, width: int, rounds: int, device: str, tick: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of both rules, of max-sum one step at a time, and of what cannot be spared, at one ``width``.

    ``noise``: max-sum of features that are white noise, whose next token nobody can foresee. ``reading``: the lengths of
    all tokens, which reads the features once. ``products``: the cosines of the chosen tokens to all others in one matrix
    product per image, ``gflop`` of it: no exact choice by sums does with less.
    """
    x = features(shape, width, device)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)
    pivot = torch.zeros(len(x), dtype=torch.long, device=device)
    order = diverse_order(x, pivot, shape.kept)
    chosen = x.gather(1, order[..., None].expand(-1, -1, width))
    cases: dict[str, Callable[[], Any]] = {
        "maxsum": lambda: diverse_order(x, pivot, shape.kept),
        "kcenter": lambda: diverse_order(x, pivot, shape.kept, rule="kcenter"),
        "noise": lambda: diverse_order(noise, pivot, shape.kept),
        "step by step": lambda: step_by_step(x, pivot, shape.kept),
        "reading": lambda: x.norm(dim=-1),
        "products": lambda: [thin_product(a, b) for a, b in zip(chosen, x, strict=True)],
    }
    timed = {name: (lambda run=run: milliseconds(run, x.device)) for name, run in cases.items()}
    times = interleaved(timed, rounds=rounds, warmup=1, tick=tick)
    return {
        "width": width,
        "ms": {name: Timing.of(values).as_dict() for name, values in times.items()},
        "best_ms": {name: min(values) for name, values in times.items()},
        "gflop": 2e-9 * shape.images * shape.kept * shape.tokens * width,
        "same_order": float(order.eq(step_by_step(x, pivot, shape.kept)).float().mean()),
    }
