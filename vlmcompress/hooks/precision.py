# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: the model's modules run under the caller's autocast, a method's own arithmetic does not.

Autocast would turn every matrix product of a method into half precision, fp32 operands or not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """For what a method computes on ``device``: its tensors' own types, whatever autocast is on."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def under_autocast(function: Callable[..., T], device: torch.device) -> Callable[..., T]:
    """``function``, which runs modules of the model, under the autocast that is on now, wherever it is called."""
    if not torch.is_autocast_enabled(device.type):
        return function
    dtype = torch.get_autocast_dtype(device.type)

    def inside(*args: Any, **kwargs: Any) -> T:
        with torch.autocast(device.type, dtype=dtype):
            return function(*args, **kwargs)

    return inside
