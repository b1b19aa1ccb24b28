# SPDX-License-Identifier: Apache-2.0
"""Make any stock Hugging Face vision-language model keep fewer visual tokens, by any published method, in one call."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .method import Composition, Method, Stage
from .registry import register_adapter, register_encoder, register_method

if TYPE_CHECKING:
    from . import flex, quecc
    from .attach import Handle, compress, restore
    from .catalog import encoders, families, methods, support
    from .ledger import VisualTokens
    from .report import Report

__version__ = "0.1.0"

__all__ = [
    "Composition",
    "Handle",
    "Method",
    "Report",
    "Stage",
    "VisualTokens",
    "compress",
    "encoders",
    "families",
    "flex",
    "methods",
    "quecc",
    "register_adapter",
    "register_encoder",
    "register_method",
    "restore",
    "support",
]

#: imported on first use, since torch and transformers' model classes take seconds
_LAZY = {
    "Handle": "attach", "compress": "attach", "restore": "attach", "encoders": "catalog", "families": "catalog",
    "support": "catalog",
    "Report": "report", "VisualTokens": "ledger",
}  # fmt: skip

#: modules that are part of the public names, likewise
_MODULES = ("flex", "quecc")


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module(".methods", __name__)  # the package of methods, which can be called
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
