# SPDX-License-Identifier: Apache-2.0
"""The one place that knows what differs between the versions of transformers that are supported (5.16 and later)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.modeling_layers import GradientCheckpointingLayer

#: what cache layers that quantise have in common
QuantizedBase: type = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)
#: gradient checkpointing runs a layer's hooks once more in the backward pass, as versions before 5.24 may do
REPLAYS_HOOKS = "__call__" in vars(GradientCheckpointingLayer)


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache in a call's keywords: named ``cache`` since transformers 5.24, ``past_key_values`` before."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def cache_keyword(callee: Callable) -> str:
    """The name that this version of transformers gives the cache argument of a function, or of a module's forward."""
    return _cache_parameter(getattr(type(callee), "forward", callee))


@functools.cache
def _cache_parameter(function: Callable) -> str:
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def merged_axes(tables: tuple[Tensor, Tensor], sections: list[int]) -> tuple[Tensor, Tensor]:
    """Rotary tables (cos, sin) [B, S, d] of a text model with three axes of positions.

    Its layers get them like that from newer versions; 5.16 hands on one table per axis, [3, B, S, d], of which every
    axis then takes its ``sections`` (channels of one half) in each layer.
    """
    if tables[0].ndim == 3:
        return tables
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(table.split(sections * 2, dim=-1))], dim=-1) for table in tables
    )
    return cos, sin


def named_pixels(given: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of a feature method with its pixels under ``name``: 5.16 calls those of some videos ``pixel_values``."""
    if name in given or "pixel_values" not in given:
        return given
    return {name if key == "pixel_values" else key: value for key, value in given.items()}


def checkpoints(model: nn.Module) -> bool:
    """Whether the layers of ``model`` are run again in the backward pass, for which they leave out any cache."""
    return getattr(model, "gradient_checkpointing", False) and model.training and torch.is_grad_enabled()


def refuse_replays(model: Any, watching: str | None) -> None:
    """Raise ``ValueError`` where checkpointing would replay hooks in training that have to run once.

    ``watching``: the method whose hooks look at single layers, None where there is none.
    """
    if watching is None or not REPLAYS_HOOKS or not (model.training and torch.is_grad_enabled()):
        return
    if getattr(model, "is_gradient_checkpointing", False):  # what open_clip and timm have is refused elsewhere
        raise ValueError(
            f"Gradient checkpointing of this version of transformers replays hooks, which '{watching}' cannot take; switch "
            "it off, use a newer transformers, or a method that looks at no layer (grid, pool, ...)."
        )
