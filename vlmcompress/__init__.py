# SPDX-License-Identifier: Apache-2.0
"""Make any stock Hugging Face vision-language model keep fewer visual tokens, by any published method, in one call."""

from __future__ import annotations

from .attach import Handle, compress, restore
from .catalog import families, methods, support
from .method import Composition, Method, Stage
from .registry import register_adapter, register_method
from .report import Report
from .tokens import VisualTokens

__version__ = "0.1.0"

__all__ = [
    "Composition",
    "Handle",
    "Method",
    "Report",
    "Stage",
    "VisualTokens",
    "compress",
    "families",
    "methods",
    "register_adapter",
    "register_method",
    "restore",
    "support",
]
