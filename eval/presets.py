# SPDX-License-Identifier: Apache-2.0
"""Architectures by name: configurations of well-known checkpoints, shipped as data under ``presets/``."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from .loading import read_config


def presets() -> list[str]:
    """Names of the shipped architectures."""
    return sorted(file.name.removesuffix(".json") for file in _folder().iterdir() if file.name.endswith(".json"))


def published_parameters(name: str) -> str:
    """Size of the preset's checkpoint as its publisher's page prints it, such as ``"7.06 B"``."""
    return _read(name)["published_parameters"]


def load_config(name: str) -> Any:
    """Configuration of a preset, a local folder or a hub id; no weights are read.

    Raises ``ValueError`` in one sentence for a name that is none of them and for a model that reads no images.
    """
    from transformers import AutoConfig

    if name in presets():
        return AutoConfig.for_model(**_read(name)["config"])
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise ValueError(f"There is no model folder and no preset '{name}'; presets: {', '.join(presets())}.")
    return read_config(name)


def _folder() -> Any:
    return files(__package__) / "presets"


def _read(name: str) -> dict[str, Any]:
    return json.loads((_folder() / f"{name}.json").read_text())
