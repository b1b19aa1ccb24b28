# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of tokens that are spread out in cosine terms (ToDRE, stage 1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..dtypes import LongTensor


def unit_vectors(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x`` [..., C] divided by its length in ``dtype``; a zero vector stays zero."""
    x = x.to(dtype)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


def diverse_order(
    x: Tensor, pivot: LongTensor, steps: int, *, rule: str = "maxsum", candidates: Tensor | None = None
) -> LongTensor:
    """Tokens in the order in which a greedy rule adds them to the pivot, for a whole batch at once.

    Args:
        x: [B, N, C] features; cosines are taken in fp32 ("maxsum") or fp64 ("kcenter", whose near-ties need it).
        pivot: [B] first token of each row.
        steps: tokens to choose, the pivot included; no more than the smallest number of candidates of interest: a row
            that runs out repeats the index 0 of what is left.
        rule: "maxsum" adds the token with the least sum of cosines to all chosen ones, "kcenter" the one whose largest
            cosine to a chosen one is least. Ties go to the lowest index.
        candidates: [B, N] bool, or None for all.

    Returns:
        [B, steps] indices in selection order. Nothing is N × N. On a GPU each step is one matrix-vector product per row and
        nothing waits for the host; on a CPU the cosines of likely next tokens are taken ahead (:class:`_Lookahead`).
    """
    if rule not in ("maxsum", "kcenter"):
        raise ValueError(f"rule is 'maxsum' or 'kcenter', not {rule!r}.")
    x = x.detach().to(torch.float32 if rule == "maxsum" else torch.float64)
    score = x.new_full(x.shape[:2], 0.0 if rule == "maxsum" else -torch.inf)
    if candidates is not None:
        score.masked_fill_(~candidates, torch.inf)
    if x.device.type == "cpu":
        images = zip(x, score, pivot.tolist(), strict=True)
        return torch.stack([_Lookahead(row, start, rule).order(first, steps) for row, start, first in images])
    unit, batch = unit_vectors(x, x.dtype), torch.arange(len(x), device=x.device)
    order = pivot.new_empty(len(x), steps)
    chosen = pivot
    for step in range(steps):
        if step:
            chosen = score.argmin(1)
        order[:, step] = chosen
        cosine = settled(torch.bmm(unit, unit[batch, chosen].unsqueeze(2)).squeeze(2))
        if rule == "maxsum":
            score += cosine
        else:
            torch.maximum(score, cosine, out=score)
        score[batch, chosen] = torch.inf
    return order


class _Lookahead:
    """The greedy choice from one image's tokens ``x`` [N, C] on a CPU, starting from ``score`` [N], which it uses up.

    A step needs the cosines of one token to all, and taken one by one they cost a reading of ``x`` each. So a token
    without its cosines brings those of the ``batch`` best scored others: most of them are chosen soon, and the order is
    that of ``score`` whether they are or not.
    """

    def __init__(self, x: Tensor, score: Tensor, rule: str, batch: int = 24):
        self.x, self.score, self.batch = x, score.numpy(), min(batch, len(x))
        self.per_length = x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny).reciprocal()
        self.join = np.add if rule == "maxsum" else np.maximum
        self.cosines: dict[int, np.ndarray] = {}
        self.known = np.zeros_like(self.score)  # infinite where the cosines are

    def order(self, chosen: int, steps: int) -> LongTensor:
        """[steps] tokens as they are chosen, ``chosen`` first."""
        found, score, cosines = [chosen], self.score, self.cosines
        while len(found) < steps:
            if chosen not in cosines:
                # all scores are alike at first
                self._take(self._best(chosen, steps - len(found)) if len(found) > 1 else [chosen])
            self.join(score, cosines[chosen], out=score)
            score[chosen] = np.inf
            chosen = int(score.argmin())
            found.append(chosen)
        return torch.tensor(found)

    def _best(self, chosen: int, left: int) -> list[int]:
        """``chosen``, which scores best, and up to ``left`` - 1 that come next among the tokens without cosines."""
        count = min(self.batch, left)
        best = np.argpartition(self.score + self.known, count - 1)[:count].tolist()
        # more tokens may tie than are taken
        return best if chosen in best else [chosen, *best[1:]]

    def _take(self, tokens: list[int]) -> None:
        """Take the cosines of ``tokens`` to all."""
        picked = torch.tensor(tokens)
        units = self.x[picked] * self.per_length[picked, None]
        rows = settled(thin_product(units, self.x).mul_(self.per_length))
        self.cosines.update(zip(tokens, rows.numpy(), strict=True))
        self.known[tokens] = np.inf


def settled(cosine: Tensor) -> Tensor:
    """``cosine`` without its last digits in fp64, so that tokens which repeat tie; fp32 has none to spare.

    A product in fp64 gives equal columns last digits that differ; in fp32 see :func:`thin_product`.
    """
    return cosine.round(decimals=10) if cosine.dtype == torch.float64 else cosine


def thin_product(a: Tensor, b: Tensor) -> Tensor:
    """[m, n] ``a`` [m, C] times the transpose of ``b`` [n, C] on a CPU, for few rows m.

    In fp32 by oneDNN where torch has it: it takes half the time of matmul, and gives equal columns equal products.
    """
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.nn.functional.linear(a.to_mkldnn(), b).to_dense()
    return a @ b.mT


def direction_pivot(x: Tensor, *, farthest: bool, candidates: Tensor | None = None) -> LongTensor:
    """[B] the token of ``x`` [B, N, C] whose cosine to the mean direction is least (``farthest``) or largest."""
    unit = unit_vectors(x)
    if candidates is not None:
        unit = unit.masked_fill(~candidates[..., None], 0)
    similarity = torch.einsum("bnc,bc->bn", unit, unit.sum(1))
    if not farthest:
        similarity = -similarity
    if candidates is not None:
        similarity = similarity.masked_fill(~candidates, torch.inf)
    return similarity.argmin(1)
