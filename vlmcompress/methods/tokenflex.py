# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX at inference: the features pooled to the count that is asked for, in front of the trained projector.

Hu et al., "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", arXiv 2504.03154.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.pool import target_grid
from ..ops.select import fit_grid
from ..pooled import pooled_images, pooled_views
from ..registry import register_method
from ..views import EntryTokens, Selection

if TYPE_CHECKING:
    from ..adapters.base import Adapter


def check_projector(method: str, adapter: Adapter) -> None:
    """Raise ``ValueError`` unless the model behind ``adapter`` has a projector that pools to any count."""
    if not hasattr(adapter.whole_projector, "pooling_function"):
        raise ValueError(
            f"'{method}' needs a TokenFLEX projector, and this model has {type(adapter.whole_projector).__name__}: load a "
            "trained one with vlmcompress.flex.from_pretrained, or put one in with vlmcompress.flex.install and train it."
        )


def check_pooled(method: str, tokens: EntryTokens) -> None:
    """Raise ``ValueError`` when the prompt's placeholders have already set a count other than the one wanted."""
    if tokens.pooled:
        raise ValueError(
            f"'{method}' pools the patches of a view, but the prompt has places for {tokens.layout.n[0]} tokens only; give "
            "it a place for every patch, or exactly as many as are to be kept."
        )


@register_method("tokenflex")
@dataclass(frozen=True)
class TokenFlex(Method):
    """Pool the patches of every view to n × n and project those: the model as if its prompt had n² places per image.

    The model must carry a TokenFLEX projector (``vlmcompress.flex``). Any count works, trained or not; one outside the
    range of the trained counts gives a ``UserWarning``. The positions of what follows an image close up, as in a prompt
    that has only so many places.

    Differs from the released code: a count that is no square is refused (the release cuts its root off); grids that are
    not square are pooled to the rectangle of that count nearest to their shape (ours).

    Args:
        keep: visual tokens per image; on a square grid of patches a square number. A share takes the largest number
            that fits. As many as there are patches, or more: all of them.
        per_view: tiled images: ``keep`` is the count of every whole view, as in the paper, and views of which padding
            was cut off keep the same resolution; otherwise it is the image's, split evenly over its views. Newlines come
            on top.
    """

    keep: int | float = 256
    per_view: bool = False

    summary: ClassVar[str] = "average pooling in front of a projector trained for any count"
    paper: ClassVar[str] = "arXiv 2504.03154"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def validate(self) -> None:
        check_keep(self.keep)

    def check_family(self, adapter: Adapter) -> None:
        check_projector(self.name, adapter)
        grid = adapter.whole_projector.grid
        if not isinstance(self.keep, int) or self.keep >= grid[0] * grid[1] or not self._counted(adapter.tiled):
            return
        target_grid(self.keep, *grid)
        trained = adapter.model.config.tokenflex["counts"]
        if not min(trained) <= self.keep <= max(trained):
            warnings.warn(
                f"{self.keep} tokens lie outside the counts that this model was trained for ({min(trained)} to "
                f"{max(trained)}); expect lower accuracy.",
                stacklevel=4,
            )

    def _counted(self, tiled: bool) -> bool:
        """Whether ``keep`` is the count of a view."""
        return self.per_view or not tiled

    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        layout = tokens.layout
        if layout.pooling is not None:
            raise ValueError(
                f"This model resizes this picture or video behind its projector; '{self.name}' pools in front of it, where "
                "the two would mix."
            )
        state["flops"] = tokens.rows.numel()
        if not layout.by_views:
            targets = [self._target(tokens_to_keep(self.keep, h * w), h, w) for h, w in layout.grid]
            if [h * w for h, w in targets] == layout.n:
                return None
            check_pooled(self.name, tokens)
            return pooled_images(tokens, targets, tokens.pooling)
        rows, cols = layout.view_grid
        if self.per_view:
            h, w = self._target(tokens_to_keep(self.keep, rows * cols), rows, cols)
            return pooled_views(tokens, lambda view, r, c: (_part(h, r, rows), _part(w, c, cols)), tokens.pooling)
        budgets = tokens.view_budgets(self.keep)
        return pooled_views(
            tokens, lambda view, r, c: fit_grid(budgets[view], r, c) if budgets[view] else (0, 0), tokens.pooling
        )

    def _target(self, count: int, rows: int, cols: int) -> tuple[int, int]:
        if count == rows * cols or isinstance(self.keep, int):
            return target_grid(count, rows, cols)
        if rows == cols:
            return (math.isqrt(count),) * 2
        return fit_grid(count, rows, cols)


def _part(tokens: int, present: int, whole: int) -> int:
    """Tokens along ``present`` of the ``whole`` cells of an axis on which all of them would get ``tokens``."""
    return min(present, max(1, round(present * tokens / whole)))
