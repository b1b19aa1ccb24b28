# SPDX-License-Identifier: Apache-2.0
"""Masks of language models in which blocks of the prompt see each other in both directions, when tokens have left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..compat import cache_keyword, cache_of
from ..dtypes import LongTensor
from ..tokens import Frame


def mask_arguments(
    builder: Callable, config: Any, mask: Tensor | None, kwargs: dict[str, Any], blocks: LongTensor | None = None
) -> dict[str, Any]:
    """Arguments of a mask ``builder`` of transformers for a language model of ``config`` that is called by ``kwargs``."""
    arguments = {
        "config": config,
        "inputs_embeds": kwargs["inputs_embeds"],
        "attention_mask": mask,
        cache_keyword(builder): cache_of(kwargs),
        "position_ids": kwargs["position_ids"],
    }
    return arguments if blocks is None else {**arguments, "block_sequence_ids": blocks}


def kept_blocks(blocks: LongTensor, kwargs: dict[str, Any], given: dict[str, Any], frame: Frame) -> LongTensor:
    """Block numbers, -1 for causal tokens, of the ``frame`` of a prompt, with those of earlier chunks in front.

    Args:
        blocks: [B, ≥ S] the uncompressed prompt's, whose last S columns are the caller's chunk.
        kwargs: arguments of the language model, for the cache that is in them.
        given: arguments of the model around it, for the number of columns of the chunk.
        frame: what is left of the chunk.

    Returns:
        [B, past + S'], by the logical numbers that the mask builders of transformers read them by.
    """
    cache = cache_of(kwargs)
    past = cache.get_seq_length() if cache is not None else 0
    ids = given.get("input_ids")
    chunk = given["inputs_embeds"] if ids is None else ids
    kept = blocks[:, blocks.shape[1] - chunk.shape[1] :].gather(1, frame.index)
    if frame.valid is not None:
        kept = kept.masked_fill(~frame.valid, -1)
    return torch.nn.functional.pad(kept, (past, 0), value=-1)
