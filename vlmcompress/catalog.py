# SPDX-License-Identifier: Apache-2.0
"""What exists and what works together."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from .method import Method
from .registry import ADAPTERS, ENCODERS, METHODS


def methods() -> dict[str, type[Method]]:
    """Every registered method by name."""
    return METHODS.items()


def families() -> list[str]:
    """``config.model_type`` of every supported model family."""
    return list(ADAPTERS.items())


def encoders() -> list[str]:
    """Kinds of image encoders without a language model that take the methods of the stage TOWER."""
    return list(ENCODERS.items())


def support(method: str, family: str) -> tuple[bool, str]:
    """Whether ``method`` works on ``family`` (or on the image encoder of that name), and if not, why.

    For the methods and families of this package: what running them gave (``support.json``, written by the tests). For
    others: whether the family serves the method's stages. Raises ``ValueError`` for an unknown name.
    """
    encoder = ENCODERS.items().get(family)
    cls, adapter = METHODS.get(method), encoder or ADAPTERS.get(family)
    why = recorded().get(method, {}).get(family)
    return adapter.supports(cls) if why is None else (not why, why)


@cache
def recorded() -> dict[str, dict[str, str]]:
    """What came of every cell of the test matrix: method → family (with ``" video"`` for its videos) → "" or why not."""
    return json.loads((files(__package__) / "support.json").read_text())
