# SPDX-License-Identifier: Apache-2.0
"""Attention rows without attention maps: one query against all keys, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_row(query: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax of one query per head over all keys.

    Args:
        query: [B, H, d].
        keys: [B, H, n, d].
        scale: factor on the logits (``d ** -0.5`` in the usual attention).
        bias: [B, n] added to the logits of every head (padding, merged sizes), or None.

    Returns:
        [B, H, n] fp32; rows sum to one.
    """
    logits = torch.einsum("bhd,bhnd->bhn", query.float() * scale, keys.float())
    if bias is not None:
        logits = logits + bias[:, None].float()
    return logits.softmax(-1)


def folded_cls_logits(
    x: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None, heads: int, scale: float
) -> Tensor:
    """Attention logits of the first token's query before the softmax, mean over heads, without projecting any key.

    The mean of the per-head products is one product of the whole vectors, and the key projection can be moved to the
    query's side: ``x · (Wkᵀ q) + q · bk`` costs one matrix-vector product per view.

    Args:
        x: [V, 1 + n, C] fp32 normalised input of the layer, the querying token first.
        wq, wk: [C, C] fp32 weights; bq, bk: [C] biases or None.
        heads: number of heads.
        scale: factor on the logits (``d ** -0.5``).

    Returns:
        [V, n] fp32; unbounded, the querying token's own column left out.
    """
    q = torch.nn.functional.linear(x[:, 0], wq, bq)
    logits = torch.einsum("vnc,vc->vn", x[:, 1:], q @ wk)
    if bk is not None:
        logits = logits + (q @ bk)[:, None]
    return logits * (scale / heads)


def negative_cosine(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """[V, n] fp32: minus the cosine of every token of ``x`` [V, n, C] to the mean of its view.

    Tokens that are not ``valid`` [V, n] count for nothing and come out as zero.
    """
    x = x.float() if valid is None else x.float().masked_fill(~valid[..., None], 0)
    # the mean's length does not matter to a cosine
    return -torch.nn.functional.cosine_similarity(x, x.sum(1, keepdim=True), dim=-1)


def logits_of(query: Tensor, keys: Tensor) -> Tensor:
    """[..., R, n] products of ``query`` [..., R, d] with ``keys`` [..., n, d].

    A CPU reads the keys twice as fast when a few queries stand as columns behind them.
    """
    if keys.device.type == "cpu" and query.shape[-2] <= 8:
        return (keys @ query.mT).mT
    return query @ keys.mT


def causal_logits(query: Tensor, keys: Tensor, rows: Tensor | None, scale: float, valid: Tensor | None) -> Tensor:
    """Attention logits of selected query rows; minus infinity where they may not look.

    Arguments as for :func:`causal_attention_rows`; ``rows`` None: all see every key. Returns [B, H, R, S] fp32.
    """
    batch, heads, count, dim = query.shape
    groups = keys.shape[1]
    grouped = (query.float() * scale).view(batch, groups, heads // groups * count, dim)
    logits = logits_of(grouped, keys.float()).reshape(batch, groups, heads // groups, count, -1)
    if rows is None:
        return logits.flatten(1, 2)
    seen = (torch.arange(keys.shape[2], device=keys.device) <= rows[..., None])[:, None]
    if valid is not None:
        seen = seen & valid.view(batch, -1, 1, keys.shape[2])
    return logits.masked_fill(~seen[:, :, None], float("-inf")).flatten(1, 2)


def softmax_of(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; a row of nothing but minus infinity comes out as zeros."""
    return logits.softmax(-1).nan_to_num(0.0)


def causal_attention_rows(query: Tensor, keys: Tensor, rows: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    """Softmax of selected query rows over the keys that they may see.

    Args:
        query: [B, H, R, d], the queries of the slots ``rows``.
        keys: [B, H_kv, S, d]; each serves ``H / H_kv`` query heads.
        rows: [B, R] slot of every query, -1 for padding.
        scale: factor on the logits.
        valid: [B, S] or [B, 1 or H_kv, S] real slots, or None for all.

    Returns:
        [B, H, R, S] fp32; a padding row is all zeros.
    """
    return softmax_of(causal_logits(query, keys, rows, scale, valid))


def received_attention(
    query: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None, valid: Tensor | None = None, chunk: int = 256
) -> Tensor:
    """Attention that each key receives: mean over heads and over all queries, in row chunks.

    Args:
        query, keys: [B, H, n, d].
        scale: factor on the logits.
        bias: [B, n] added to the logits of every key, or None.
        valid: [B, n] queries that count, or None for all.
        chunk: query rows at a time; memory is B · H · chunk · n floats.

    Returns:
        [B, n] fp32.
    """
    total = torch.zeros(keys.shape[0], keys.shape[2], device=keys.device)
    weight = query.new_ones(query.shape[0], query.shape[2], dtype=torch.float32) if valid is None else valid.float()
    for rows, counted in zip(query.float().split(chunk, dim=2), weight.split(chunk, dim=1), strict=True):
        logits = (rows * scale) @ keys.float().mT
        if bias is not None:
            logits = logits + bias[:, None, None].float()
        total += torch.einsum("bhqn,bq->bn", logits.softmax(-1), counted) / query.shape[1]
    return total / weight.sum(1, keepdim=True)
