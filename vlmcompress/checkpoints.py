# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of stock models whose projector is one of ours."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .projectors import TRAINED

_PROJECTOR = "multi_modal_projector."
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def loader_of(config: PreTrainedConfig) -> Callable[..., PreTrainedModel]:
    """The ``from_pretrained`` for a model with this configuration: the stock one, or that of its projector."""
    for entry, loader in TRAINED.items():
        if getattr(config, entry, None):
            module, _, name = loader.rpartition(".")
            return getattr(import_module(module), name)
    return AutoModelForImageTextToText.from_pretrained


def load_with_projector(
    name: str, config: PreTrainedConfig, attach: Callable[[PreTrainedModel], nn.Module], **options: Any
) -> PreTrainedModel:
    """Load ``name`` with its stock class, exchange the projector with ``attach`` and give it the saved weights.

    The stock class goes first because only it gets the renaming of keys that its checkpoints need. Raises ``ValueError``
    when weights other than the projector's are missing, or the projector's own.
    """
    with without_report():
        model, info = AutoModelForImageTextToText.from_pretrained(
            name, config=config, output_loading_info=True, **options
        )
    lost = sorted(key for key in info["missing_keys"] if _PROJECTOR not in key)
    if lost:
        raise ValueError(f"The checkpoint '{name}' lacks {len(lost)} of the model's tensors, among them {lost[0]}.")
    projector = attach(model)
    weights = projector_weights(name, {k: v for k, v in options.items() if k in _HUB_OPTIONS})
    missing = sorted(set(projector.state_dict()) - set(weights))
    if missing:
        raise ValueError(f"The checkpoint '{name}' lacks the projector's weights ({missing[0]} and so on).")
    projector.load_state_dict(weights)
    return model


def projector_weights(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The projector's tensors of a saved model, by their names inside the projector."""
    try:
        files = {cached_file(name, SAFE_WEIGHTS_NAME, **hub)}
    except OSError:  # in several files
        with open(cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **hub)) as file:
            shards = {shard for key, shard in json.load(file)["weight_map"].items() if _PROJECTOR in key}
        files = {cached_file(name, shard, **hub) for shard in shards}
    found = {}
    for path in sorted(files):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                if _PROJECTOR in key:
                    found[key.partition(_PROJECTOR)[2]] = tensors.get_tensor(key)
    return found


@contextmanager
def without_report():
    """Hold back the report of unexpected and missing keys, which our projector makes long and which we check."""

    def quiet(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    loggers = [logging.getLogger(f"transformers.{part}") for part in ("modeling_utils", "utils.loading_report")]
    for logger in loggers:
        logger.addFilter(quiet)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(quiet)
