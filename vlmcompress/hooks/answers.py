# SPDX-License-Identifier: Apache-2.0
"""What methods answer, looked over before it is followed: a mistake in a method ends in a sentence that names it.

Only what is known without asking the device is looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..tokens import Frame, Layout, Selection
from ..views import Cut

if TYPE_CHECKING:
    from ..method import Method

T = TypeVar("T")


def checked_selection(answer: Any, layout: Layout, method: Method) -> Selection | None:
    """``answer`` of :meth:`Method.entry`; raises ``ValueError`` in one sentence for one that cannot be meant."""
    if answer is None:
        return None
    selection = _of_kind(answer, Selection, "entry", method)
    images = len(layout)
    _check_counts(selection.counts, layout.n, "entry", method)
    _check_tensor(selection.keep, (images, None), torch.long, "keep", "entry", method)
    if max(selection.counts, default=0) > selection.keep.shape[1]:
        raise _mistake("entry", method, f"counts of {selection.counts} for a keep of {selection.keep.shape[1]} places")
    if selection.features is not None and selection.features.shape[:2] != selection.keep.shape:
        raise _mistake(
            "entry", method, f"features of {list(selection.features.shape)} for {list(selection.keep.shape)} places"
        )
    return selection


def checked_cut(answer: Any, frame: Frame, method: Method, hook: str = "prefill") -> Cut | None:
    """``answer`` of :meth:`Method.prefill` or :meth:`Method.arrival`; raises ``ValueError`` like the above."""
    if answer is None:
        return None
    cut = _of_kind(answer, Cut, hook, method)
    _check_counts(cut.counts, frame.counts, hook, method)
    _check_tensor(cut.mask, tuple(frame.index.shape), torch.bool, "mask", hook, method)
    return cut


def _of_kind(answer: Any, kind: type[T], hook: str, method: Method) -> T:
    if not isinstance(answer, kind):
        raise _mistake(hook, method, f"{type(answer).__name__} instead of {kind.__name__} or None")
    return answer


def _check_counts(counts: Any, most: list[int], hook: str, method: Method) -> None:
    fine = isinstance(counts, list) and len(counts) == len(most) and all(isinstance(n, int) for n in counts)
    if not fine or not all(0 <= n <= m for n, m in zip(counts, most, strict=True)):
        raise _mistake(hook, method, f"counts {counts!r}; wanted is a list of one int per image, of at most {most}")


def _check_tensor(x: Any, shape: tuple, dtype: torch.dtype, name: str, hook: str, method: Method) -> None:
    fine = isinstance(x, Tensor) and x.ndim == len(shape) and x.dtype == dtype
    if not fine or any(want not in (None, n) for n, want in zip(x.shape, shape, strict=True)):
        found = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise _mistake(hook, method, f"a {name} of {found}; wanted is {dtype} [{wanted}]")


def _mistake(hook: str, method: Method, what: str) -> ValueError:
    return ValueError(f"The {hook} hook of '{method.name or type(method).__name__}' answered {what}.")
