# SPDX-License-Identifier: Apache-2.0
"""Attention masks for layers whose caches differ in length and in what they hold."""

from __future__ import annotations

import torch
from torch import Tensor


def require_mask_support(config) -> None:
    """Raise ``ValueError`` when the attention back-end cannot take the mask that ragged tokens need."""
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"This compression needs an attention mask that '{implementation}' attention cannot take; "
            "load the model with attn_implementation='sdpa'."
        )


def check_layer_masks(config, name: str) -> None:
    """Raise ``ValueError`` when the attention back-end cannot serve the method ``name``, which acts inside the decoder."""
    if config._attn_implementation == "flex_attention":
        raise ValueError(
            f"'{name}' gives every decoder layer its own mask, which flex attention cannot take; load the model with "
            "attn_implementation='sdpa'."
        )


def joined_mask(past: int, past_valid: Tensor | None, new_valid: Tensor | None, offset: int, shape) -> Tensor | None:
    """2-D mask for stock mask builders over a compressed cache; None when every entry is real.

    They read the last ``past + q`` columns of a mask as long as the *logical* sequence, so ``offset`` columns of ones
    stand in front for the tokens that left. Returns [B, offset + past + q] bool.
    """
    if past_valid is None and new_valid is None:
        return None
    batch, columns, device = shape
    old = torch.ones(batch, past, dtype=torch.bool, device=device) if past_valid is None else past_valid
    new = torch.ones(batch, columns, dtype=torch.bool, device=device) if new_valid is None else new_valid
    gone = torch.ones(batch, offset, dtype=torch.bool, device=device)
    return torch.cat([gone, old, new], dim=1)


def layer_mask(
    past: int, past_valid: Tensor | None, new_valid: Tensor | None, hidden: Tensor, config, *, blind: bool = False
) -> Tensor | None:
    """Mask for one decoder layer: every new token sees the real entries of its cache and its own causal past.

    Args:
        past: entries in the layer's cache.
        past_valid: [B, 1 or H_kv, past] bool or None.
        new_valid: [B, q] bool or None.
        hidden: [B, q, D], for shape, dtype and device.
        config: the text config (attention back-end, head counts).
        blind: a new token that comes alone does not see itself.

    Returns:
        None where the back-end needs none; bool [B, 1 or H, q, past + q] for sdpa, additive for eager, 2-D bool for
        flash attention.
    """
    batch, q = hidden.shape[:2]
    implementation = config._attn_implementation
    if past_valid is None and new_valid is None and (q == 1 or (past == 0 and implementation != "eager")):
        return None
    device = hidden.device
    old = torch.ones(batch, 1, past, dtype=torch.bool, device=device) if past_valid is None else past_valid
    new = torch.ones(batch, q, dtype=torch.bool, device=device) if new_valid is None else new_valid
    if implementation.startswith("flash") and old.shape[1] == 1:
        return None if past_valid is None and new_valid is None else torch.cat([old[:, 0], new], dim=1)
    require_mask_support(config)
    if old.shape[1] > 1:
        old = old.repeat_interleave(config.num_attention_heads // old.shape[1], dim=1)
    causal = torch.ones(q, q, dtype=torch.bool, device=device).tril()
    # a padding query sees itself, so that no row is empty; nobody reads its output
    own = (causal & new[:, None]) | torch.eye(q, dtype=torch.bool, device=device)
    if blind and q == 1:
        own = torch.zeros_like(own)
    seen = torch.cat([old[:, :, None].expand(-1, -1, q, -1), own[:, None].expand(-1, old.shape[1], -1, -1)], dim=-1)
    if implementation == "eager":
        return torch.zeros(seen.shape, dtype=hidden.dtype, device=device).masked_fill(
            ~seen, torch.finfo(hidden.dtype).min
        )
    return seen
