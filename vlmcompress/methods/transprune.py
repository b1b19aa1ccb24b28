# SPDX-License-Identifier: Apache-2.0
"""TransPrune: keep the visual tokens that the language model's middle layers change most and its question looks at.

Li, Duan et al., "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv 2507.20630.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate as running
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Method, Stage, check_keep
from ..ops.select import top_mask
from ..ops.transition import transition_scalars, transition_weight
from ..registry import register_method
from ..views import Cut, PrefillLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter

#: published for 32 layers: cuts after these layers (1-based), and the layers whose transitions are summed
LAYERS, ACCUMULATE, DEPTH = (7, 9, 12), (7, 8, 9, 10, 11, 12), 32
#: shares of the visual tokens behind each cut; "low" is inferred from the paper's TFLOPs, not published
PRESETS = {"high": (0.875, 0.625, 0.125), "low": (0.65, 0.25, 0.05)}


@dataclass(frozen=True)
class Schedule:
    """Cuts of one model: after which layers (1-based), the share that goes on behind each, whose TTV is summed."""

    depth: int
    layers: tuple[int, ...]
    fractions: tuple[float, ...]
    accumulate: tuple[int, ...]

    def counts(self, n: int) -> list[int]:
        """Visual tokens behind each cut when ``n`` enter: truncated as in the official code (0.29 of 100 are 28)."""
        return [int(n * share) for share in self.fractions]

    def per_layer(self, n: int) -> list[int]:
        """Visual tokens that each decoder layer processes when ``n`` enter."""
        return [n] * self.layers[0] + [
            k for k, span in zip(self.counts(n), self._spans, strict=True) for _ in range(span)
        ]  # fmt: skip

    @property
    def _spans(self) -> list[int]:
        """Layers behind each cut that see what it left."""
        return [end - start for start, end in pairwise((*self.layers, self.depth))]

    @property
    def average(self) -> float:
        """Layer-averaged share of the visual tokens."""
        behind = sum(f * s for f, s in zip(self.fractions, self._spans, strict=True))
        return (self.layers[0] + behind) / self.depth


@register_method("transprune")
@dataclass(frozen=True)
class TransPrune(Method):
    """Three cuts in the middle layers by token transition (TTV) plus instruction-guided attention (IGA).

    TTV of a token (section 3.2 of the paper): what the attention block and the feed-forward block of a layer do to its
    magnitude and direction, summed over the ``accumulate`` layers so far. IGA (section 3.3): the attention it gets in
    the layer behind the cut from the text after the image. Both are normalised over an image's tokens and added with
    weights ``alpha`` and 1 - ``alpha``; the best keep their order.

    Differs from the official code: three fp32 scalars per token are taken in hooks instead of copies of whole states;
    softmax denominators run over the sample's own tokens (officially over the whole batch, padding included); every
    image of a prompt has its own budget and the instruction is the text after the last one (officially later images
    count as instruction); a text without such rows falls back to all its text; grouped-query backbones and per-head
    norms work. The paper's formula has |cos| where the code that made its results has cos: see ``direction``. Position
    ids are renumbered at every cut as published; ``positions="original"`` keeps the image's geometry and is the better
    choice where localisation matters.

    Args:
        keep: layer-averaged visual tokens per image, or their share of those that enter the language model; replaces
            ``preset`` and ``fractions``. The schedule lies on the line nothing – low – high – everything that has the
            asked average. Below the average of "low" all layers move to the front together, by the fewest layers that
            make room for it.
        preset: "high" (published, 41 % of the tokens at 32 layers) or "low" (inferred from published TFLOPs, 31 %).
        layers: cuts come after these layers, counted from 1; None: 7, 9 and 12 of 32, scaled to the model's depth.
        fractions: share of the visual tokens behind each cut; 0 drops all. One that is larger than the one before it
            is lowered to that, with a warning.
        accumulate: layers whose TTV is summed, counted from 1; None: from the first cut to the last.
        alpha: weight of TTV; 1 ranks by TTV alone and 0 by IGA alone, and what is not needed is not computed.
        direction: "signed" (1 - cos, the code) or "abs" (1 - |cos|, the paper's formula).
        pooled: several images of a prompt share one budget and are ranked together, so that one of them may vanish.
    """

    keep: int | float | None = None
    preset: str = "high"
    layers: tuple[int, ...] | None = None
    fractions: tuple[float, ...] | None = None
    accumulate: tuple[int, ...] | None = None
    alpha: float = 0.5
    direction: str = "signed"
    pooled: bool = False

    summary: ClassVar[str] = "tokens that middle layers change most and the question looks at, in three cuts"
    paper: ClassVar[str] = "arXiv 2507.20630"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.PREFILL})
    query_aware: ClassVar[bool] = True

    def validate(self) -> None:
        for name in ("layers", "fractions", "accumulate"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))  # lists come back from a saved configuration
        if self.keep is not None:
            check_keep(self.keep)
            if self.fractions is not None:
                raise ValueError("keep solves for the fractions of a schedule, so give either keep or fractions.")
        if self.preset not in PRESETS:
            raise ValueError(f"preset is one of {', '.join(PRESETS)}, not {self.preset!r}.")
        if self.direction not in ("signed", "abs"):
            raise ValueError(f"direction is 'signed' or 'abs', not {self.direction!r}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha, the weight of TTV, lies between 0 and 1, not {self.alpha}.")
        for name in ("layers", "accumulate"):
            value = getattr(self, name)
            if value is not None and (not value or value[0] < 1 or list(value) != sorted(set(value))):
                raise ValueError(f"{name} are layer numbers from 1 up, ascending, not {value}.")
        self._check_fractions()

    def _check_fractions(self) -> None:
        shares = self.fractions or ()
        if any(not 0 <= f <= 1 for f in shares):
            raise ValueError(f"fractions are shares between 0 and 1, not {shares}.")
        falling = tuple(running(shares, min))
        if falling != shares:
            # the official code stops here; tokens that have left cannot come back
            warnings.warn(f"fractions {shares} grow, so {falling} are what can stay.", stacklevel=2)
            object.__setattr__(self, "fractions", falling)
        stages = len(self.layers) if self.layers is not None else len(LAYERS)
        given = len(PRESETS[self.preset] if self.fractions is None else shares)
        if stages != given:
            raise ValueError(f"There are {stages} cuts in layers, but {given} fractions; each cut needs one.")

    # schedule ---------------------------------------------------------------------------------------------------
    def schedule(self, depth: int, share: float | None = None) -> Schedule:
        """The cuts on a language model of ``depth`` layers; ``share``: layer-averaged share to solve for.

        Raises ``ValueError`` when no schedule has so small an average.
        """
        if share is None:
            return self._placed(depth, 0, self.fractions or PRESETS[self.preset])
        points = [(0.0,) * 3, PRESETS["low"], PRESETS["high"], (1.0,) * 3]
        first = (self.layers or self._scaled(LAYERS, depth))[0]
        shift = 0
        # explicit layers stay where they are
        while self.layers is None and shift < first - 1 and self._placed(depth, shift, points[1]).average > share:
            shift += 1
        line = [self._placed(depth, shift, p) for p in points]
        if share < line[0].average:
            raise ValueError(
                f"'transprune' sees all visual tokens in its first {line[0].layers[0]} of {depth} layers, so their "
                f"average share is at least {line[0].average:.3f}; {share:.3f} was asked for."
            )
        for less, more in pairwise(line):
            if share <= more.average:
                t = (share - less.average) / (more.average - less.average)
                # the margin keeps a share that is meant to be whole from losing a token to rounding in binary
                fractions = [
                    min(1.0, a + t * (b - a) + 1e-12) for a, b in zip(less.fractions, more.fractions, strict=True)
                ]
                return Schedule(depth, less.layers, tuple(fractions), less.accumulate)
        return line[-1]

    def _placed(self, depth: int, shift: int, fractions: tuple[float, ...]) -> Schedule:
        layers = self.layers or self._scaled(LAYERS, depth)
        moved = [max(1, p - shift) for p in layers]
        accumulate = self.accumulate
        if accumulate is None:
            accumulate = tuple(range(moved[0], moved[-1] + 1))
        # cuts that fall on one layer in a shallow model are one cut, with the last one's share
        last = dict(zip(moved, fractions, strict=True))
        return Schedule(depth, tuple(last), tuple(last.values()), tuple(accumulate))

    @staticmethod
    def _scaled(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
        return tuple(max(1, round(p * depth / DEPTH)) for p in layers)

    def check_family(self, adapter: Adapter) -> None:
        depth = len(adapter.decoder_layers)
        last = (self.layers or self._scaled(LAYERS, depth))[-1]
        if last >= depth:
            raise ValueError(f"A cut after layer {last} has no layer behind it: this language model has {depth}.")
        if self.keep is not None and isinstance(self.keep, float):
            self.schedule(depth, self.keep)

    # hooks ------------------------------------------------------------------------------------------------------
    def _fixed(self, adapter: Adapter) -> Schedule | None:
        """The schedule, where it does not depend on how many tokens an image has."""
        return None if isinstance(self.keep, int) else self.schedule(len(adapter.decoder_layers), self.keep)

    def cut_layers(self, adapter: Adapter) -> Collection[int]:
        fixed = self._fixed(adapter)
        if fixed is not None:
            return [p - 1 for p in fixed.layers]
        return range((self.layers or self._scaled(LAYERS, len(adapter.decoder_layers)))[-1])

    def watch_layers(self, adapter: Adapter) -> Collection[int]:
        if self.alpha == 0:
            return ()
        fixed = self._fixed(adapter)
        return self.cut_layers(adapter) if fixed is None else [a - 1 for a in fixed.accumulate if a <= fixed.layers[-1]]

    def watch(self, layer: int, part: str, inputs: Tensor, outputs: Tensor, state: dict) -> None:
        wanted = state.get("wanted")
        if wanted is None or layer + 1 in wanted:
            state.setdefault("pending", []).append((layer + 1, *transition_scalars(inputs, outputs)))
            state["flops"] = state.get("flops", 0) + 6 * inputs.numel()

    def prefill(self, layer: PrefillLayer, state: dict) -> Cut | None:
        unit = layer.together() if self.pooled else layer
        if "plans" not in state:
            state["plans"] = self._plans(unit, layer)
            state["entered"] = list(unit.frame.counts)
            state["wanted"] = {a for plan in state["plans"] for a in plan.accumulate}
        after, counts = layer.index + 1, list(unit.frame.counts)
        for number, (plan, n) in enumerate(zip(state["plans"], state["entered"], strict=True)):
            if after in plan.layers:
                counts[number] = min(counts[number], plan.counts(n)[plan.layers.index(after)])
        if counts == unit.frame.counts:
            return None
        score = self.score(layer, state)
        if "scores" not in state:
            state["scores"] = layer.ranking(score)
        if not self.pooled:
            return layer.keep(top_mask(score, counts), counts)
        together = unit.of_images(layer.to_slots(score), fill=float("-inf"))
        return layer.apart(unit.keep(top_mask(together, counts), counts))

    def _plans(self, unit: PrefillLayer, layer: PrefillLayer) -> list[Schedule]:
        """The schedule of every image, or of every sample where its images are ranked together."""
        if not isinstance(self.keep, int):
            return [self.schedule(layer.depth, self.keep)] * len(unit.frame.counts)
        images = [layer.layout.sample.count(sample) if self.pooled else 1 for sample in unit.layout.sample]
        shares = [self.keep * many / n if n else self.keep for many, n in zip(images, unit.frame.counts, strict=True)]
        return [self.schedule(layer.depth, min(1.0, share)) for share in shares]

    # scores -----------------------------------------------------------------------------------------------------
    def score(self, layer: PrefillLayer, state: dict) -> Tensor:
        """[I, c_max] fp32 score of each image's alive tokens, ``-inf`` where there is none."""
        _, valid = layer.frame.slots()
        score = torch.zeros(valid.shape, device=layer.hidden.device)
        if self.alpha > 0:
            score += self.alpha * self._share(self.transition(layer, state), layer)
        if self.alpha < 1:
            score += (1 - self.alpha) * self._share(self.guidance(layer), layer)
        state["flops"] = state.get("flops", 0) + layer.flops
        return score.masked_fill(~valid, float("-inf"))

    def transition(self, layer: PrefillLayer, state: dict) -> Tensor:
        """[I, c_max] TTV summed over the layers so far; what has been watched since the last cut is added up here."""
        tokens, (_, valid) = layer.tokens(), layer.frame.slots()
        total = state.get("total")
        if total is None:
            total = torch.zeros(layer.layout.cell.shape, device=layer.hidden.device)
        for number, magnitude, cosine in state.pop("pending", []):
            weight = transition_weight(magnitude, cosine, layer.frame.valid, absolute=self.direction == "abs")
            per_token = layer.of_images(weight)
            counted = [number in plan.accumulate for plan in self._per_image(state["plans"], layer)]
            if not all(counted):
                per_token = per_token * torch.tensor(counted, device=per_token.device)[:, None]
            total = total.scatter_add(1, tokens, per_token)  # padding adds 0 to token 0
        state["total"] = total
        return total.gather(1, tokens).masked_fill(~valid, 0.0)

    def _per_image(self, plans: list[Schedule], layer: PrefillLayer) -> list[Schedule]:
        if not self.pooled:
            return plans
        samples = sorted(set(layer.layout.sample))
        return [plans[samples.index(sample)] for sample in layer.layout.sample]

    def guidance(self, layer: PrefillLayer) -> Tensor:
        """[I, c_max] IGA: mean over heads and instruction rows of the next layer's attention."""
        rows = layer.instruction_rows()
        total = sum(part.sum(1) for part in layer.mean_attention(rows, following=True))
        return layer.of_images(total / (rows >= 0).sum(1, keepdim=True))

    def _share(self, x: Tensor, layer: PrefillLayer) -> Tensor:
        """Normalise the values [I, c_max] of each image, or of all images of a sample, to sum one."""
        total = x.sum(1)
        if self.pooled:
            rows = layer.layout.batch_index[:, 0]
            total = total.new_zeros(len(layer.hidden)).index_add(0, rows, total)[rows]
        return x / (total[:, None] + 1e-8)
