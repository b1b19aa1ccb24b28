# SPDX-License-Identifier: Apache-2.0
"""Thresholds for an average number of tokens, found on a handful of samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .attach import compress
from .methods.mustdrop import MustDrop


def average_tokens(model: PreTrainedModel, method: MustDrop, samples: Sequence[Mapping[str, Any]]) -> float:
    """Layer-averaged visual tokens per image when ``model`` runs the prompts ``samples`` under ``method``."""
    total = images = 0.0
    with compress(model, method) as handle, torch.no_grad():
        for sample in samples:
            model(**sample, use_cache=False, logits_to_keep=1)
            total += sum(handle.last.layer_tokens) / len(handle.last.layer_tokens)
            images += len(handle.last.layout)
    return total / images


def calibrate(
    model: PreTrainedModel,
    samples: Sequence[Mapping[str, Any]],
    average: float,
    *,
    method: MustDrop | None = None,
    ratio: float = 1.0,
    tolerance: float = 0.01,
    steps: int = 20,
) -> MustDrop:
    """Find MustDrop's thresholds by bisection so that images keep ``average`` tokens each, averaged over the layers.

    The published thresholds belong to LLaVA-1.5-7B and its benchmarks; other models need their own. Counted are the
    tokens that each decoder layer processes. (The official scripts count what is left *behind* each layer, which comes
    out lower by the dropped tokens over the depth.)

    Args:
        model: an uncompressed model; it is left as it was.
        samples: model inputs as the processor makes them, each with at least one image. A few dozen images do.
        average: visual tokens per image, averaged over layers and images.
        method: the method whose thresholds to replace (its other settings stay); default ``MustDrop()``.
        ratio: alpha / gamma.
        tolerance: stop when the average is this close, as a share of ``average``.
        steps: forward passes over all samples, at most.

    Returns:
        ``method`` with ``gamma`` and ``alpha`` set and ``keep`` removed; of the thresholds tried, those that come
        nearest. Counts jump where samples are few, so the average may be missed by more than ``tolerance``.

    Raises:
        ValueError: no samples, or an average outside what the method can reach: above what merging leaves, or below
            what the layers up to the first filter and the key set take.
    """
    if not samples:
        raise ValueError("Calibration needs at least one sample with an image.")
    if not ratio > 0 or not average > 0:
        raise ValueError(f"average and ratio are above 0, not {average} and {ratio}.")
    method = dataclasses.replace(MustDrop() if method is None else method, keep=None)

    def at(gamma: float) -> MustDrop:
        return dataclasses.replace(method, gamma=gamma, alpha=gamma * ratio)

    # attention never exceeds 1, so above that only the key set stays
    top = max(1.0, 1.0 / ratio) * 1.001
    most, least = (average_tokens(model, at(gamma), samples) for gamma in (0.0, top))
    if not least <= average <= most:
        raise ValueError(
            f"On these samples an image averages {least:.1f} to {most:.1f} visual tokens whatever the thresholds; "
            f"{average} was asked for (key_rate and layers set the lower end, similarity the upper)."
        )
    low, high = 1e-7, top
    found, missed = (at(0.0), most - average) if most - average < average - least else (at(top), average - least)
    for _ in range(steps):
        if missed <= tolerance * average:
            break
        gamma = (low * high) ** 0.5  # thresholds range over decades
        got = average_tokens(model, at(gamma), samples)
        if abs(got - average) < missed:
            found, missed = at(gamma), abs(got - average)
        low, high = (gamma, high) if got > average else (low, gamma)
    return found
