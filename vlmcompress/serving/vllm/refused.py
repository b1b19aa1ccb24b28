# SPDX-License-Identifier: Apache-2.0
"""vLLM's own classes of families that we compress in transformers only: they refuse the setting instead of ignoring it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn
from vllm.config import VllmConfig

from ..settings import ENTRY
from . import REFUSED, SERVED


class Refusing(nn.Module):
    """Mixin in front of a stock class."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if getattr(vllm_config.model_config.hf_config, ENTRY, None) is not None:
            raise ValueError(
                f"'{ENTRY}' is set, and {type(self).__name__} cannot be served compressed by vLLM; these can: "
                f"{', '.join(SERVED)}. `vlmcompress serve` runs any family that the library knows."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def __getattr__(name: str) -> Any:
    if name not in REFUSED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = getattr(import_module(f"vllm.model_executor.models.{REFUSED[name]}"), name)
    made = globals()[name] = type(name, (Refusing, stock), {"__module__": __name__, "__doc__": stock.__doc__})
    return made
