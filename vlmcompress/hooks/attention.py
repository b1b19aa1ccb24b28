# SPDX-License-Identifier: Apache-2.0
"""Attention rows of a decoder layer, recomputed from its own projections for the few queries that a method asks about."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..dtypes import LongTensor
from ..ops.rope import rotate
from ..ops.scores import causal_attention_rows
from .precision import own_precision


def _heads(attention: nn.Module, projected: Tensor, norm: str) -> Tensor:
    """[B, R, H·d] → [B, H, R, d], through the per-head norm of models that have one."""
    x = projected.view(*projected.shape[:-1], -1, attention.head_dim)
    if hasattr(attention, norm):
        x = getattr(attention, norm)(x)
    return x.transpose(1, 2)


def queries(
    layer: nn.Module, hidden: Tensor, embeddings: tuple[Tensor, Tensor], projected: Tensor | None = None
) -> Tensor:
    """[B, H, R, d] rotated queries of ``hidden`` [B, R, D] at the rotary tables ``embeddings`` ([B, R, d] each).

    ``projected`` [B, R, H·d]: what the layer's own query projection made of ``hidden``, where that is at hand.
    """
    attention = layer.self_attn
    if projected is None:
        projected = attention.q_proj(layer.input_layernorm(hidden))
    x = _heads(attention, projected, "q_norm")
    return rotate(x, *(table.to(x.device) for table in embeddings))


def keys(layer: nn.Module, hidden: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """[B, H_kv, S, d] rotated keys of ``hidden`` [B, S, D]."""
    attention = layer.self_attn
    x = _heads(attention, attention.k_proj(layer.input_layernorm(hidden)), "k_norm")
    return rotate(x, *(table.to(x.device) for table in embeddings))


def values(layer: nn.Module, hidden: Tensor) -> Tensor:
    """[B, H_kv, S, d] values of ``hidden`` [B, S, D]."""
    attention = layer.self_attn
    x = attention.v_proj(layer.input_layernorm(hidden))
    return x.view(*x.shape[:-1], -1, attention.head_dim).transpose(1, 2)


def rows_of(
    layer: nn.Module, hidden: Tensor, embeddings: tuple[Tensor, Tensor], rows: LongTensor, valid: Tensor | None,
    cached_keys: Tensor | None = None, past: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """[B, H, R, S] fp32 attention of the slots ``rows`` [B, R] (-1: padding) over what they causally see.

    ``hidden`` [B, S, D]: what the layer's input norm reads; ``cached_keys``: the layer's rotated keys of these S slots
    where a cache holds them already; ``past``: keys [B, H_kv, P, d] of earlier chunks and their validity [B, P].
    """
    at = rows.clamp_min(0)[..., None]
    picked = hidden.gather(1, at.expand(-1, -1, hidden.shape[-1]))
    tables = tuple(t.expand(len(hidden), -1, -1).gather(1, at.expand(-1, -1, t.shape[-1])) for t in embeddings)
    k = keys(layer, hidden, embeddings) if cached_keys is None else cached_keys
    q = queries(layer, picked, tables)
    if past is None:
        with own_precision(k.device):
            return causal_attention_rows(q, k, rows, layer.self_attn.scaling, valid)
    old, old_valid = past
    batch, _, length, _ = old.shape
    if valid is not None or old_valid is not None:
        ones = torch.ones(batch, 1, dtype=torch.bool, device=k.device)
        parts = (old_valid, length), (valid, k.shape[2])
        valid = torch.cat([ones.expand(-1, n) if part is None else part for part, n in parts], dim=1)
    seen_up_to = torch.where(rows < 0, -1, rows + length)
    with own_precision(k.device):
        both = causal_attention_rows(q, torch.cat([old, k], dim=2), seen_up_to, layer.self_attn.scaling, valid)
    return both[..., length:]


def rows_cost(layer: nn.Module, hidden: Tensor, rows: LongTensor, project_keys: bool) -> int:
    """Floating-point operations of :func:`rows_of`, without keys of earlier chunks."""
    attention, (batch, length, width) = layer.self_attn, hidden.shape
    q_width, k_width = attention.q_proj.out_features, attention.k_proj.out_features
    keys_cost = 2 * batch * length * width * k_width if project_keys else 0
    return 2 * rows.numel() * q_width * (width + length) + keys_cost
