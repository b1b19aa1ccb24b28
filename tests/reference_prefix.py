# SPDX-License-Identifier: Apache-2.0
"""The slow reference of families whose prompt is not causal: full sequence, no cache, dropped tokens hidden by a mask."""

from __future__ import annotations

import torch
from models import AHEAD

from vlmcompress.adapters.base import adapter_for


def blocks_of(model, inputs):
    """[B, S] number of the block whose tokens see each other; -1 for causal tokens."""
    types = inputs["token_type_ids"]
    if model.config.model_type == "paligemma":
        return torch.where(types == 0, 0, -1)
    starts = (types == 1) & torch.nn.functional.pad(types, (1, 0))[:, :-1].ne(1)
    return torch.where(types == 1, starts.cumsum(1), -1)


def reference(model, embeds, there, blocks, base, later=None):
    """Logits of ``embeds`` [B, S, D] and the tokens ``later`` [B, T], columns that are not ``there`` invisible.

    On the full sequence, without a cache; a window counts the columns that are there.
    """
    if later is not None:
        steps = later.shape[1]
        embeds = torch.cat([embeds, model.get_input_embeddings()(later)], 1)
        there = torch.nn.functional.pad(there, (0, steps), value=True)
        blocks = torch.nn.functional.pad(blocks, (0, steps), value=-1)
        base = torch.cat([base, base[:, -1:] + 1 + torch.arange(steps)], 1)
    length = embeds.shape[1]
    together = (blocks[:, :, None] == blocks[:, None]) & (blocks >= 0)[:, None]
    causal, rank = torch.ones(length, length, dtype=torch.bool).tril(), there.cumsum(1)
    config = model.config.text_config
    near = rank[:, :, None] - rank[:, None] < (getattr(config, "sliding_window", None) or length)
    # PaliGemma's prefix sees beyond the window, Gemma 3's images do not
    windowed = (causal & near) | together if model.config.model_type == "paligemma" else (causal | together) & near
    masks = {}
    for name, allowed in (("full_attention", causal | together), ("sliding_attention", windowed)):
        allowed = (allowed & there[:, None]) | torch.eye(length, dtype=torch.bool)
        masks[name] = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    mask = masks if hasattr(config, "layer_types") else masks["full_attention"]
    text = adapter_for(model).language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=base, use_cache=False
    )  # fmt: skip
    logits = model.lm_head(text.last_hidden_state)
    cap = getattr(config, "final_logit_softcapping", None)
    # PaliGemma of 5.16 leaves the cap out
    capped = AHEAD and model.config.model_type != "gemma3"
    return logits if cap is None or not capped else torch.tanh(logits / cap) * cap
