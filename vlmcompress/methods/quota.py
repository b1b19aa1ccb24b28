# SPDX-License-Identifier: Apache-2.0
"""QuoTA: the frames of a video share one budget of tokens by how well each of them serves the question.

Luo et al., "QuoTA: Query-oriented Token Assignment via CoT Query Decouple for Long Video Comprehension", AAAI 2026,
arXiv 2503.08689. The released code has no licence; this is written from the paper and a description.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..method import Method, Stage, check_keep
from ..ops.frames import (
    VERSIONS,
    cap_once,
    filled_grids,
    frame_weights,
    grid_of,
    resize_frame,
    truncated_budget,
)
from ..ops.select import fit_grid, largest_remainder
from ..pooled import rectangles, resized_views
from ..quota import ANY_OF, ENOUGH
from ..quota_model import ModelScorer, processor_of
from ..registry import register_method
from ..views import EntryTokens, Selection

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..dtypes import LongTensor

#: all frames weigh the same
EVEN = "even"
#: a frame has as many tokens at most as it is resized from
GRID = "grid"
#: scores of the frames of one video, or what gives them for its pixels [frames, ...]
Scores = Sequence[Sequence[float]] | Callable[[Tensor | None], Sequence[float]]


@register_method("quota")
@dataclass(frozen=True)
class QuoTA(Method):
    """Resize every frame of a video to its share of the budget; frames without a share leave.

    A frame's share is its score, squared, over the sum of all. By default the model itself gives it, during the call and
    with nothing of this library on: it is shown every frame alone and asked whether that serves the question of the
    prompt (:class:`vlmcompress.quota_model.ModelScorer`). Or scores are made beforehand, by
    :class:`vlmcompress.quota.FrameScorer` with a smaller model, or by anything else that tells how well a frame serves the
    question.

    Frames are resized from what the projector makes of them, in front of the model's own pooling behind it
    (LLaVA-OneVision: 27 × 27 and not 14 × 14 tokens), so a frame can have more tokens than without compression. In families
    that pool or join patches in front of the projector, what it takes is resized.

    Differs from the official code: no token of the budget is lost to rounding or to the shape of grids, and what a frame
    cannot hold goes to the others. Frames that a family merges in pairs are scored by the mean of the pair. An image of one
    view counts as a video of one frame; tiled images pass whole. A budget of all tokens leaves the model as it is.

    Args:
        keep: tokens per video, or their share; newlines do not count.
        scores: None for the model's own; per video of the call the scores of its frames, each in [0, 1]; a function of its
            pixels; or "even".
        processor: of the model, for its own scores; None: the one beside its weights.
        letter: the answer that means yes, one token, whose probability is the score.
        any_of, enough: what a frame is asked, with a list of ``{objects}`` and with the ``{question}`` itself; None for
            :data:`vlmcompress.quota.ANY_OF` and :data:`vlmcompress.quota.ENOUGH`.
        decouple: True lets the model list the objects first; a regular expression takes its groups in the question for
            them.
        version: how frames are resized: "v1" bilinear, "v2" average pooling, "v3" evenly spaced tokens, "v4" merging, "v5"
            merging inside rows, then columns.
        cap: most tokens of one frame: "grid", as many as it is resized from; a number; or None, for frames that grow beyond
            that (square ones, "v1" to "v3"), as "v1" of the released code lets them.
        exponent: of the scores.
        rounding: "exact", or "truncate" as in the released code, which loses a few per cent of the budget.
    """

    keep: int | float = 12544
    scores: Scores | str | None = None
    processor: Any = field(default=None, repr=False, compare=False)
    letter: str = "A"
    any_of: str | None = None
    enough: str | None = None
    decouple: bool | str = False
    version: str = "v1"
    cap: int | str | None = "grid"
    exponent: float = 2.0
    rounding: str = "exact"

    summary: ClassVar[str] = "frames of a video are resized by how well they serve the question"
    paper: ClassVar[str] = "arXiv 2503.08689"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})
    query_aware: ClassVar[bool] = True
    fixed_budget: ClassVar[bool] = False
    before_pooling: ClassVar[bool] = True

    def validate(self) -> None:
        check_keep(self.keep)
        if self.version not in VERSIONS:
            raise ValueError(f"version is one of {', '.join(VERSIONS)}, not {self.version!r}.")
        if self.rounding not in ("exact", "truncate"):
            raise ValueError(f"rounding is 'exact' or 'truncate', not {self.rounding!r}.")
        whole = isinstance(self.cap, int) and not isinstance(self.cap, bool)
        if not (self.cap is None or self.cap == GRID or (whole and int(self.cap) >= 1)):
            raise ValueError(f"cap is 'grid', a number of tokens of at least 1, or None, not {self.cap!r}.")
        if self.exponent <= 0:
            raise ValueError(f"exponent is a positive number, not {self.exponent}.")
        if isinstance(self.decouple, str):
            _check_pattern(self.decouple)
        if isinstance(self.scores, str):
            if self.scores != EVEN:
                raise ValueError(f"scores is numbers, a function, 'even' or None, not {self.scores!r}.")
        elif self.scores is not None and not callable(self.scores):
            if any(isinstance(row, (int, float)) for row in self.scores):
                raise ValueError("scores has one sequence of numbers for each video, even where there is one video.")
            object.__setattr__(self, "scores", tuple(tuple(map(float, row)) for row in self.scores))

    def check_family(self, adapter: Adapter) -> None:
        if adapter.tiled and "video" not in adapter.doors:
            raise ValueError("'quota' splits a budget over the frames of a video, and this family takes tiled images.")
        self.equip(adapter)

    def options(self) -> dict[str, Any]:
        """The hyper-parameters; a function and the processor are not among them, as they cannot be saved."""
        unsaved = {"processor", *(["scores"] if callable(self.scores) else [])}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in unsaved}

    def asks(self, adapter: Adapter) -> Collection[str]:
        return () if self.scores is not None else ("video",)

    def equip(self, adapter: Adapter) -> ModelScorer | None:
        """What asks the model itself; None where it is not to be asked, or has no processor to ask it with."""
        if self.scores is not None or "video" not in adapter.doors:
            return None
        processor = self.processor if self.processor is not None else processor_of(adapter.model)
        if processor is None:
            return None
        return ModelScorer(
            adapter, processor, any_of=self.any_of or ANY_OF, enough=self.enough or ENOUGH, letter=self.letter,
            decouple=self.decouple,
        )  # fmt: skip

    def ask(self, given: dict[str, Any], ids: LongTensor | None, state: dict, equipment: ModelScorer | None) -> None:
        if equipment is None:
            raise ValueError(
                "'quota' lets the model itself score the frames of a video, and there is no processor beside its weights "
                "to ask it with; pass processor=, scores= or scores='even'."
            )
        if ids is None:
            raise ValueError("'quota' reads the question from input_ids; pass them instead of embeddings, or scores=.")
        state["p"], state["flops"] = equipment(given, ids)

    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        layout, budgets = tokens.layout, tokens.budgets(self.keep)
        if layout.thumbnail is not None or budgets == layout.patch.sum(1).tolist():
            return None
        sources = self.sources(tokens)
        owner, rows, grids = layout.view_image.tolist(), list(sources), [None] * len(sources)
        ranking = torch.zeros(len(owner), device=tokens.rows.device)
        for image, budget in enumerate(budgets):
            mine = [v for v, i in enumerate(owner) if i == image]
            p = self.scores_of(tokens, image, len(mine), state)
            ranking[mine] = p.float().to(ranking.device)
            box = tuple(sources[mine[0]].shape[:2])
            counts = self.counts(p, budget, [sources[v].shape[0] * sources[v].shape[1] for v in mine])
            for v, count, grid in zip(mine, counts, self.grids(counts, box), strict=True):
                gridded = self.version not in ("v3", "v4")
                grids[v] = grid if gridded else None
                source = sources[v]
                rows[v] = resize_frame(source, count, self.version, grid) if count else source[:0].flatten(0, 1)
        state["scores"] = tokens.of_views(ranking[:, None].expand(-1, tokens.view_cells().shape[1]), fill=float("-inf"))
        state["flops"] = state.get("flops", 0) + 8 * sum(source.numel() for source in sources)
        return resized_views(tokens, rows, grids)

    def sources(self, tokens: EntryTokens) -> list[Tensor]:
        """[rows, cols, C] of every view that its new tokens are made of.

        Where the model pools frames behind its projector, what it pools; "v4" merges pooled ones in the released code too.
        """
        if tokens.unpooled is not None and self.version != "v4":
            side = math.isqrt(tokens.unpooled.shape[1])
            return list(tokens.unpooled.unflatten(1, (side, side)))
        shapes = rectangles(tokens.view_cells().cpu(), tokens.layout.view_widths)
        table = zip(tokens.rows, shapes, strict=True)
        return [view[cells.to(view.device)].view(*box, view.shape[-1]) for view, (cells, box) in table]

    def scores_of(self, tokens: EntryTokens, image: int, views: int, state: dict) -> Tensor:
        """[views] fp64 scores of one video's frames, or of its groups of frames that are merged before the tower.

        ``state["p"]``: what :meth:`ask` has found.
        """
        if self.scores == EVEN or tokens.layout.kind[image] != "video":
            return torch.ones(views, dtype=torch.float64)
        if self.scores is None:
            found = state["p"][image]
        elif callable(self.scores):
            found = self.scores(tokens.pixels_of(image))
        elif image < len(self.scores):
            found = self.scores[image]
        else:
            raise ValueError(f"There are scores of {len(self.scores)} videos, but this call brings more.")
        p = torch.as_tensor(found, dtype=torch.float64).flatten().cpu()
        if not len(p) or len(p) % views:
            raise ValueError(f"There are {len(p)} scores for a video of {views} frames or groups of frames.")
        return p.view(views, -1).mean(1)

    def counts(self, p: Tensor, budget: int, sizes: list[int]) -> list[int]:
        """Tokens of every frame with scores ``p`` [T], which are made of ``sizes`` each."""
        weights, caps = frame_weights(p, self.exponent), [self._most(size, budget) for size in sizes]
        if self.rounding == "exact":
            return largest_remainder(weights.tolist(), min(budget, sum(caps)), caps)
        if self.version != "v1" and self.cap is not None:
            weights = cap_once(weights, caps[0] / budget)
        counts = [min(count, cap) for count, cap in zip(truncated_budget(weights, budget), caps, strict=True)]
        if not any(counts):  # the released code is left without any frame and stops
            for frame in weights.argsort(descending=True, stable=True)[:budget].tolist():
                counts[frame] = 1
        return counts

    def _most(self, size: int, budget: int) -> int:
        """Most tokens of one frame that is made of ``size``; merging makes no more of them."""
        if self.cap is None:
            return size if self.version in ("v4", "v5") else budget
        return size if self.cap == GRID else min(size, int(self.cap))

    def grids(self, counts: list[int], box: tuple[int, int]) -> list[tuple[int, int]]:
        """(h, w) of every frame: squares as in the paper, on frames that are none rectangles of their shape."""
        if box[0] != box[1]:
            return [fit_grid(count, *box) if count else (0, 0) for count in counts]
        if self.rounding != "exact":
            return [grid_of(count) for count in counts]
        return filled_grids(counts, self._most(box[0] * box[1], max(1, sum(counts))))


def _check_pattern(pattern: str) -> None:
    """Raise ``ValueError`` in one sentence unless ``pattern`` is a regular expression with a group."""
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"decouple is True, False or a regular expression, not {pattern!r} ({error}).") from error
    if not groups:
        raise ValueError(f"The groups of decouple's regular expression are the objects, and {pattern!r} has none.")
