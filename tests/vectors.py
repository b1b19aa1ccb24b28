# SPDX-License-Identifier: Apache-2.0
"""Where the reference vectors lie: beside the project, not in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "../shared/vectors"


def folder(method: str) -> Path:
    return ROOT / method


def cases(method: str, kind: tuple[str, ...] | None = None) -> list:
    """Paths of a method's case descriptions; one skipped entry where the vectors are not beside the project."""
    if not folder(method).exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason="reference vectors are not beside the project"))]
    paths = sorted(folder(method).glob("case_*.json"))
    return [p for p in paths if kind is None or json.loads(p.read_text()).get("kind") in kind]
