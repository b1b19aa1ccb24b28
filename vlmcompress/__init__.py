# SPDX-License-Identifier: Apache-2.0
"""Make any stock Hugging Face vision-language model keep fewer visual tokens, by any published method, in one call."""

from __future__ import annotations

from importlib import import_module

# loaded before the function of the same name is bound below: imported later, the package would take its place
import_module(".methods", __name__)

from .attach import Handle, compress, restore  # noqa: E402
from .catalog import families, methods, support  # noqa: E402
from .method import Composition, Method, Stage  # noqa: E402
from .registry import register_adapter, register_method  # noqa: E402
from .report import Report  # noqa: E402
from .tokens import VisualTokens  # noqa: E402

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
