# SPDX-License-Identifier: Apache-2.0
"""What exists and what works together."""

from __future__ import annotations

from .method import Method
from .registry import ADAPTERS, METHODS


def methods() -> dict[str, type[Method]]:
    """Every registered method by name."""
    return METHODS.items()


def families() -> list[str]:
    """``config.model_type`` of every supported model family."""
    return list(ADAPTERS.items())


def support(method: str, family: str) -> tuple[bool, str]:
    """Whether ``method`` works on ``family``, and if not, why.

    Raises ``ValueError`` for an unknown name.
    """
    cls, adapter = METHODS.get(method), ADAPTERS.get(family)
    return adapter.supports(cls)
