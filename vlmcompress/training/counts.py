# SPDX-License-Identifier: Apache-2.0
"""Token counts drawn anew for every batch: the schedule, the expansion of collapsed prompts, the Trainer's callback."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

IGNORED = -100
#: what padding holds in each column of a batch, 0 where it is not named
_FILL = {"labels": IGNORED}
DRAWS = ("micro_batch", "step")


@dataclass(frozen=True)
class CountSchedule:
    """The count of every micro-batch as a pure function of (seed, step, micro-step), so that a resumed run draws alike.

    Args:
        counts: token counts, ascending.
        probabilities: of each; they add up to 1.
        seed: the run's.
        draw: "micro_batch" (the published one) or "step": one count for a whole accumulation step.
        sync_ranks: the same count on every data-parallel rank. Otherwise every step waits for the longest.
    """

    counts: Sequence[int]
    probabilities: Sequence[float]
    seed: int = 0
    draw: str = "micro_batch"
    sync_ranks: bool = True

    def __post_init__(self) -> None:
        if self.draw not in DRAWS:
            raise ValueError(f"draw is one of {', '.join(DRAWS)}, not {self.draw!r}.")
        if len(self.counts) != len(self.probabilities) or abs(sum(self.probabilities) - 1) > 1e-6:
            raise ValueError("A schedule takes one probability for each count, and they add up to 1.")

    def count(self, step: int, micro: int = 0, rank: int = 0) -> int:
        """Tokens per view in micro-step ``micro`` of optimiser step ``step`` on ``rank``."""
        key = (self.seed, step, micro if self.draw == "micro_batch" else 0, 0 if self.sync_ranks else rank)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        u = int.from_bytes(digest, "big") / 2**64
        place = bisect_right(list(accumulate(self.probabilities)), u)
        return self.counts[min(place, len(self.counts) - 1)]

    @property
    def mean(self) -> float:
        """Expected tokens per view."""
        return sum(n * p for n, p in zip(self.counts, self.probabilities, strict=True))


def expand(batch: dict[str, Any], image_token_id: int, tokens: int, pad_id: int = 0) -> dict[str, Any]:
    """A batch with one placeholder per image → one with ``tokens`` of them.

    Every column of the shape of ``input_ids`` [B, S] goes along (labels, mask, weights of tokens); padding is dropped and
    made anew, on its side. ``position_ids`` leave: they follow from the mask.
    """
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else (mask != 0).long()
    repeats = torch.where(ids == image_token_id, tokens, 1) * real
    lengths = repeats.sum(1)
    width = int(lengths.max())
    source = torch.repeat_interleave(torch.arange(ids.numel(), device=ids.device), repeats.flatten())
    row = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), lengths)
    place = torch.arange(len(source), device=ids.device) - (lengths.cumsum(0) - lengths)[row]
    if bool((real[:, 0] == 0).any()):
        place = place + (width - lengths)[row]
    out = {key: value for key, value in batch.items() if key != "position_ids"}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape == ids.shape and key != "position_ids":
            fill = pad_id if key == "input_ids" else _FILL.get(key, 0)
            column = value.new_full((len(ids), width), fill)
            column[row, place] = value.flatten()[source]
            out[key] = column
    if mask is None and bool((lengths != width).any()):
        made = torch.zeros(len(ids), width, dtype=torch.long, device=ids.device)
        made[row, place] = 1
        out["attention_mask"] = made
    return out


class FlexCallback(TrainerCallback):
    """Draws the count of every micro-batch and expands its collapsed prompts in front of the model, while it trains.

    The Trainer collates ahead of the steps, so the collator (:class:`~.chats.ChatCollator`) leaves one placeholder per
    image and the count is applied here. Logs the visual tokens seen so far and how often each count was drawn.
    """

    def __init__(self, schedule: CountSchedule):
        self.schedule = schedule
        self.step = self.micro = self.rank = 0
        self.drawn: Counter[int] = Counter()
        self.visual_tokens = 0
        self._hook: Any = None

    @property
    def tokens(self) -> int:
        """Count of the micro-batch at hand."""
        return self.schedule.count(self.step, self.micro, self.rank)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.rank = args.process_index
        counted = [row for row in state.log_history if "visual_tokens" in row]
        if counted:  # a run that goes on
            self.visual_tokens = counted[-1]["visual_tokens"]
            self.drawn.update({n: counted[-1][f"batches_at_{n}"] for n in self.schedule.counts})
        self._hook = base.register_forward_pre_hook(self._expand, with_kwargs=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_begin(self, args, state, control, **kwargs):
        self.step, self.micro = state.global_step, 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.micro += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs and self.drawn:
            seen = {
                "visual_tokens": self.visual_tokens,
                **{f"batches_at_{n}": self.drawn[n] for n in self.schedule.counts},
            }
            logs.update(seen)
            state.log_history[-1].update(seen)

    def _expand(self, module: nn.Module, args: tuple, kwargs: dict):
        if not module.training or not is_collapsed(kwargs, module.config.image_token_id):
            return None
        tokens, views = self.tokens, len(kwargs["pixel_values"])
        self.drawn[tokens] += 1
        self.visual_tokens += tokens * views
        pad = module.config.get_text_config().pad_token_id
        return args, expand(kwargs, module.config.image_token_id, tokens, pad or 0)


def is_collapsed(batch: dict[str, Any], image_token_id: int) -> bool:
    """Whether a batch brings images and exactly one placeholder for each."""
    if batch.get("pixel_values") is None or batch.get("input_ids") is None:
        return False
    return int((batch["input_ids"] == image_token_id).sum()) == len(batch["pixel_values"])
