# SPDX-License-Identifier: Apache-2.0
"""Which entries of a key-value cache stay: the best scored, the most recent and the first, per head and per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dtypes import LongTensor
from .scores import logits_of


def share_of(part: int | float, length: int | LongTensor, *, add: float = 0.0) -> int | LongTensor:
    """Entries that ``part`` means for a prompt of ``length`` tokens (an int, or [B]).

    An int is meant absolutely; a float is a share, ``floor(part · length + add)`` (``add=0.5`` rounds).
    """
    if isinstance(part, int):
        return part
    if isinstance(length, int):
        return math.floor(part * length + add)
    return (length.double() * part + add).floor().long()


def retain(
    scores: Tensor, valid: Tensor | None, best: int | LongTensor, recent: int | LongTensor, sinks: int = 0, *,
    width: int, visual: Tensor | None = None, visual_share: float | None = None,
) -> tuple[LongTensor, Tensor | None]:  # fmt: skip
    """The first ``sinks`` real entries, the ``recent`` newest ones, and of the others the ``best`` with the top scores.

    Args:
        scores: [B, H, n] fp32, one decision per head; of equal ones the lower entry stays.
        valid: [B, 1 or H, n] real entries, or None for all.
        best, recent: how many, an int or [B].
        sinks: how many.
        width: the largest ``best + recent + sinks`` of any row, known on the host so that nothing waits for a device.
        visual: [B, 1 or H, n] bool: entries of visual tokens; with ``visual_share``, which of the ``best`` (rounded)
            goes to visual entries and the rest to text. What one side cannot fill goes to the other.

    Returns:
        keep [B, H, K] ascending, K = min(n, width), and which of them are real ([B, H, K], padding in front; None when
        all are, that is without ``valid`` and with one budget for all rows).
    """
    n = scores.shape[-1]
    alike = valid is None and not isinstance(best, Tensor) and not isinstance(recent, Tensor)
    if visual_share is None and alike and isinstance(recent, int) and n == width + 1:
        return _all_but_one(scores, recent, sinks), None
    best, recent = _column(best), _column(recent)
    if valid is None:
        age = torch.arange(n, 0, -1, device=scores.device)
        protected = (age <= recent) | (age > n - sinks)
    else:
        order = valid.int().cumsum(-1)
        protected = valid & ((order[..., -1:] - order < recent) | (order <= sinks))
    protected = protected.expand_as(scores)
    ranked = scores.masked_fill(protected, float("inf"))
    if valid is not None:
        ranked = ranked.masked_fill(~valid, float("-inf"))
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    certain = protected.sum(-1, keepdim=True)
    if visual is None or visual_share is None:
        chosen = torch.arange(n, device=scores.device) < certain + best
    else:
        chosen = _by_modality(order, certain, best, visual.expand_as(scores), valid, visual_share)
    if valid is not None:
        chosen = chosen & valid.expand_as(scores).gather(-1, order)
    kept = order.masked_fill(~chosen, -1).sort(dim=-1).values[..., n - min(n, width) :]
    # padding points at an entry that leaves, or at one that is padding itself
    return torch.where(kept < 0, order[..., -1:], kept), None if alike else kept >= 0


def _all_but_one(scores: Tensor, recent: int, sinks: int) -> LongTensor:
    """[B, H, n - 1]: everything but the least scored candidate (the last of equal ones); no sorting."""
    n = scores.shape[-1]
    candidates = scores[..., sinks : n - recent].flip(-1)
    gone = n - recent - 1 - candidates.argmin(-1, keepdim=True)
    kept = torch.arange(n - 1, device=scores.device).expand(*scores.shape[:2], -1)
    return kept + (kept >= gone)


def _column(count: int | LongTensor) -> int | LongTensor:
    return count.view(-1, 1, 1) if isinstance(count, Tensor) else count


def _by_modality(
    order: LongTensor, certain: LongTensor, best: int | LongTensor, visual: Tensor, valid: Tensor | None, share: float
) -> Tensor:
    """[B, H, n] bool in the order of ``order``: the first ``certain``, then the best of either modality."""
    open_places = torch.arange(order.shape[-1], device=order.device) >= certain
    if valid is not None:
        open_places = open_places & valid.expand_as(order).gather(-1, order)
    picture = visual.gather(-1, order)
    image, text = picture & open_places, ~picture & open_places
    there, others = image.sum(-1, keepdim=True), text.sum(-1, keepdim=True)
    best = torch.as_tensor(best, device=order.device)
    wanted = (best * share + 0.5).floor().long()
    given = torch.minimum(there, torch.maximum(wanted, best - others))
    rest = best - given
    first = torch.arange(order.shape[-1], device=order.device) < certain
    return first | (image & (image.cumsum(-1) <= given)) | (text & (text.cumsum(-1) <= rest))


def simulated_mask(
    scores: Tensor, valid: Tensor | None, best: int | LongTensor, recent: int | LongTensor
) -> tuple[Tensor, Tensor]:
    """What the mask simulations of H2O and Keyformer hide from the next token.

    Their window of ``recent`` slots includes the next token, yet the candidates end where a window of the present
    tokens would begin: the entry between the two is hidden whatever its score.

    Args:
        scores: [B, H, n] fp32; ``valid`` [B, 1 or H, n] or None; ``best``, ``recent``: an int or [B].

    Returns:
        ([B, H, n] bool: candidates that are not among the ``best``, [B, 1 or H, n] bool: the entry in the gap).
    """
    n = scores.shape[-1]
    if valid is None:
        age = torch.arange(n, 0, -1, device=scores.device).view(1, 1, n)
    else:
        order = valid.int().cumsum(-1)
        age = order[..., -1:] - order + 1
    best, recent = _column(best), _column(recent)
    candidate = age > recent if valid is None else (age > recent) & valid
    ranked = scores.masked_fill(~candidate, float("-inf"))
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    return candidate & (rank >= best), age == recent


def decayed(length: int, factor: float, device: torch.device) -> Tensor:
    """[length] fp32 weights ``factor^(length - 1 - q)``; with factor 0 only the last is 1."""
    power = torch.arange(length - 1, -1, -1, dtype=torch.float64, device=device)
    return torch.pow(torch.tensor(factor, dtype=torch.float64, device=device), power).float()


def gumbel(seed: int, *counters: Tensor) -> Tensor:
    """Standard Gumbel noise that depends on ``seed`` and the integer ``counters`` alone; they broadcast.

    A counter-based generator: a token's noise is the same in every batch, on every device and however the prompt was
    cut, and there is no state to carry. Put the counters with few elements first.
    """
    primes = (-1640531527, 1540483477, 668265263, 374761393)  # odd, below 2^31 in size
    mixed = torch.as_tensor(_wrap(seed * 2654435761 + 1), dtype=torch.int32, device=counters[0].device)
    for counter, prime in zip(counters, primes, strict=False):
        mixed = _mix(mixed) + counter.int() * prime
    uniform = ((_mix(mixed) >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)
    return -(-uniform.log()).log()


def _wrap(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _mix(x: Tensor) -> Tensor:
    """A bijective hash of 32-bit integers."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _wrap(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def recurrence(last: Tensor, longest: Tensor, step: int, *, official: bool = True) -> Tensor:
    """LazyEviction's importance of tokens last active at step ``last`` whose longest quiet spell was ``longest``.

    Args:
        last, longest: integers of one shape; ``longest`` 0 where no spell has been seen.
        step: the present step.
        official: the formula of the released code, ``2σ(-1 - (t - last)/(longest + 1e-5)) + 2σ(1 - longest)``;
            otherwise the paper's, without the -1 and the 1e-5 (0 where ``longest`` is 0).

    Returns:
        fp32 of the same shape.
    """
    quiet, longest = (step - last).float(), longest.float()
    seen = longest > 0
    second = torch.where(seen, 2 * torch.sigmoid(1 - longest), 0.0)
    if official:
        return 2 * torch.sigmoid(-1 - quiet / (longest + 1e-5)) + second
    return torch.where(seen, 2 * torch.sigmoid(-quiet / longest.clamp_min(1)), 0.0) + second


def coarse(scores: Tensor, bits: int = 9) -> Tensor:
    """fp32 ``scores`` ≥ 0 rounded to 23 - ``bits`` binary places, so that sums which only rounding tells apart tie.

    Tokens that repeat have equal keys, and a matrix product of another shape adds up in another order.
    """
    return ((scores.view(torch.int32) + (1 << bits - 1)) & -(1 << bits)).view(torch.float32)


def soft_votes(query: Tensor, keys: Tensor, candidates: Tensor, *, modulo: bool = False) -> Tensor:
    """TokenSelect: how much all heads together want to see each entry.

    Args:
        query: [B, H, d]; keys: [B, H_kv, n, d]. Logits are not scaled.
        candidates: [B, n] bool: entries that are voted about.
        modulo: query head h reads KV head ``h mod H_kv`` as the official kernel does, not ``h // (H / H_kv)``.

    Returns:
        [B, n] fp32: the sum over heads of the softmax over the candidates; others are 0.
    """
    batch, heads, dim = query.shape
    groups = keys.shape[1]
    if modulo:
        grouped = query.float().view(batch, heads // groups, groups, dim).transpose(1, 2)
    else:
        grouped = query.float().view(batch, groups, heads // groups, dim)
    logits = logits_of(grouped, keys.float()).masked_fill(~candidates[:, None, None], float("-inf"))
    return logits.softmax(-1).nan_to_num(0.0).sum((1, 2))
