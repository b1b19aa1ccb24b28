# SPDX-License-Identifier: Apache-2.0
"""PRIOR: weight caption tokens by how badly a text-only model predicts them.

Chen et al., "Prioritizing Image-Related Tokens Enhances Vision-Language Pre-Training", arXiv 2505.08971. The authors have
published no training code; the formula is the paper's, what it leaves open is marked as ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

IGNORED = -100
NORMALIZE = ("caption", "batch", "none")
#: a caption whose weights add up to less is one that the reference is certain of everywhere
_NOTHING = 1e-8


@dataclass(frozen=True)
class PriorLoss:
    """Next-token loss in which token i of a caption of k tokens counts k · w_i / Σ w_j, w = (1 − P_r)^alpha.

    Set it as ``model.loss_function``; a batch column ``token_weights`` reaches it through the stock forward pass and the
    stock Trainer. Without the column it is the plain loss, so evaluation needs no switch.

    ``token_weights`` [B, S] holds 1 − P_r of ``input_ids[b, s]`` given what is before it (floats in [0, 1], or uint8 with
    255 for 1), 0 where nothing is supervised. No gradient reaches it.

    Args:
        alpha: 0 is the plain loss, exactly.
        normalize: "caption" (the paper: every caption keeps its total weight), "batch" or "none" (for ablations).
        smooth: w ← (1 − smooth) · w + smooth · mean(w) of the caption; keeps language from being forgotten (ours).
        cap: w is cut off at this value first, such as a quantile over the data set (ours); see :func:`quantile`.

    Raises:
        ValueError: an alpha below 0, a smooth or cap outside 0 to 1, an unknown normalize; at a call, weights of another
            shape than the labels.
    """

    alpha: float = 1.0
    normalize: str = "caption"
    smooth: float = 0.0
    cap: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise ValueError(f"alpha is at least 0 (0 is the plain loss), not {self.alpha}.")
        if self.normalize not in NORMALIZE:
            raise ValueError(f"normalize is one of {', '.join(NORMALIZE)}, not {self.normalize!r}.")
        if not 0 <= self.smooth <= 1 or not 0 < self.cap <= 1:
            raise ValueError(f"smooth and cap are shares from 0 to 1, not {self.smooth} and {self.cap}.")

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        token_weights: Tensor | None = None,
        segment_ids: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """Scalar loss of ``logits`` [B, S, V] and ``labels`` [B, S]; ``segment_ids`` [B, S]: captions in packed rows.

        Divided by ``num_items_in_batch`` (the supervised tokens of the whole step), or by those of the batch.
        """
        target = _next(labels.to(logits.device), IGNORED)
        here = target != IGNORED
        losses = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(target)
        if token_weights is not None and self.alpha > 0:
            if token_weights.shape != labels.shape:
                raise ValueError(
                    f"token_weights has the shape {tuple(token_weights.shape)}, the labels {tuple(labels.shape)}; they go "
                    "together, token by token."
                )
            weights = _next(_as_share(token_weights).to(logits.device), 0.0)
            segments = None if segment_ids is None else _next(segment_ids.to(logits.device), 0)
            losses = losses * self.factors(weights, here, segments)
        items = here.sum().clamp_min(1) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / (items.to(losses.device) if isinstance(items, Tensor) else items)

    def factors(self, weights: Tensor, here: Tensor, segments: Tensor | None = None) -> Tensor:
        """[B, S] factor of every token's loss: mean 1 over the tokens ``here`` of each caption, 0 elsewhere.

        ``weights`` [B, S] fp32: 1 − P_r; ``segments`` [B, S] numbers the captions of a row (default: one).
        """
        groups = _groups(here, segments, whole=self.normalize == "batch")
        count = int(groups.max()) + 1
        w = (weights.detach().clamp(0, self.cap) ** self.alpha).masked_fill(~here, 0.0)
        number = _sums(here.float(), groups, count)
        if self.smooth:
            mean = (_sums(w, groups, count) / number.clamp_min(1))[groups]
            w = ((1 - self.smooth) * w + self.smooth * mean).masked_fill(~here, 0.0)
        if self.normalize == "none":
            return w
        total = _sums(w, groups, count)
        scale = number / total.clamp_min(_NOTHING)
        return torch.where((total < _NOTHING)[groups], here.float(), w * scale[groups])


prior_loss = PriorLoss()


def _next(column: Tensor, fill: float) -> Tensor:
    """[B, S] moved up by one: what position s predicts."""
    return torch.nn.functional.pad(column, (0, 1), value=fill)[:, 1:].contiguous()


def _as_share(weights: Tensor) -> Tensor:
    return weights.float() / 255 if weights.dtype == torch.uint8 else weights.float()


def _groups(here: Tensor, segments: Tensor | None, *, whole: bool) -> Tensor:
    """[B, S] number of the caption that every position belongs to."""
    if whole:
        return torch.zeros_like(here, dtype=torch.long)
    rows = torch.arange(len(here), device=here.device)[:, None].expand_as(here)
    if segments is None:
        return rows
    return rows * (int(segments.max()) + 1) + segments.clamp_min(0)


def _sums(values: Tensor, groups: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add(0, groups.flatten(), values.flatten())


@torch.no_grad()
def reference_weights(
    reference: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    image_token_id: int,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """1 − P_r of every supervised token under a text-only model, [B, S] fp32, 0 elsewhere.

    The context is all that stands before a token except image placeholders and padding: the prompt belongs to it. The
    reference must share the tokenizer. A vision-language model works as its own untuned reference, without pixels.
    """
    kept = input_ids != image_token_id
    if attention_mask is not None:
        kept &= attention_mask.bool()
    length = int(kept.sum(1).max())
    # text flushed to the left, in order
    order = kept.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    real = kept.gather(1, order)
    ids = input_ids.gather(1, order).masked_fill(~real, 0)
    device = reference.device
    logits = reference(input_ids=ids.to(device), attention_mask=real.long().to(device), use_cache=False).logits
    log_p = logits[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None].to(device))[..., 0]
    weights = torch.nn.functional.pad(-torch.expm1(log_p), (1, 0)).to(input_ids.device)
    found = torch.zeros(input_ids.shape, device=input_ids.device).scatter(1, order, weights.clamp(0, 1) * real)
    return found.masked_fill(labels == IGNORED, 0.0)


class CachedWeights:
    """1 − P_r of every token of a data set, as uint8 (an error of at most 0.002), one row per sample of any length.

    One scoring pass serves every alpha and every number of visual tokens.
    """

    def __init__(self, rows: Iterable[Tensor]):
        self.rows = [row if row.dtype == torch.uint8 else (row * 255).round().to(torch.uint8) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, sample: int) -> Tensor:
        """[S] uint8 of one sample."""
        return self.rows[sample]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        lengths = torch.tensor([len(row) for row in self.rows])
        save_file({"weights": torch.cat([torch.empty(0, dtype=torch.uint8), *self.rows]), "lengths": lengths}, path)

    @classmethod
    def load(cls, path: str | Path) -> CachedWeights:
        """Read what :meth:`save` wrote. Raises ``ValueError`` when there is no such file."""
        if not Path(path).is_file():
            raise ValueError(f"There is no file '{path}' with cached reference probabilities.")
        stored = load_file(path)
        return cls(stored["weights"].split(stored["lengths"].tolist()))


def quantile(cached: CachedWeights | Sequence[Tensor], share: float) -> float:
    """The value below which ``share`` of all weights above 0 lie, for :class:`PriorLoss`'s ``cap``."""
    every = torch.cat([_as_share(row) for row in (cached.rows if isinstance(cached, CachedWeights) else cached)])
    return float(every[every > 0].quantile(share))
