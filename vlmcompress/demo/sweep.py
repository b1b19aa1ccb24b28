# SPDX-License-Identifier: Apache-2.0
"""One method over budgets: accuracy on a small sample of scenes, and costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..attach import compress
from ..eval.loading import answer, encode, first_sentence
from ..eval.stats import accuracy
from ..eval.tasks import Sample, load
from ..method import create
from .ask import UNCOMPRESSED, takes_budget
from .models import Loaded

TASK, BATCH, NEW_TOKENS = "scenes", 20, 4
SHARES = (0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Point:
    """A budget: share of the visual tokens, correct answers of ``questions``, costs per question.

    ``low`` and ``high``: 95 % interval of the accuracy, pictures resampled. ``gflops``: None where not known. ``error``:
    why the method refuses this budget; nothing else is known then.
    """

    method: str
    share: float
    questions: int = 0
    accuracy: float = 0.0
    low: float = 0.0
    high: float = 0.0
    tokens: float = 0.0
    layer_tokens: float = 0.0
    gflops: float | None = None
    kv_kib: float = 0.0
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def sweep(
    loaded: Loaded, method: str, questions: int = 40, shares: Sequence[float] = SHARES, positions: str = "published"
) -> Iterator[Point]:
    """The uncompressed model first (share 1), then the method from the largest budget down.

    Raises ``ValueError`` in one sentence for a method without a budget.
    """
    if not takes_budget(method):
        raise ValueError(f"'{method}' has no budget per image, so there is nothing to sweep; choose another method.")
    samples = load(TASK, limit=questions)
    for name, share in [(UNCOMPRESSED, 1.0), *((method, share) for share in sorted(shares, reverse=True))]:
        try:
            yield _point(loaded, samples, name, share, positions)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            yield Point(name, share, error=first_sentence(error))


def _point(loaded: Loaded, samples: Sequence[Sample], name: str, share: float, positions: str) -> Point:
    """All questions at one budget. The uncompressed model is read off the baseline ``none``, which changes nothing."""
    method = create("none") if name == UNCOMPRESSED else create(name, keep=share)
    correct: list[float] = []
    reports = []
    with loaded.lock, compress(loaded.model, method, positions=positions) as handle:
        for start in range(0, len(samples), BATCH):
            batch = samples[start : start + BATCH]
            inputs = encode(loaded.model, loaded.processor, [s.image for s in batch], [s.question for s in batch])
            said = answer(loaded.model, loaded.processor, inputs, NEW_TOKENS)
            correct += [s.mark(text)["correct"] for s, text in zip(batch, said, strict=True)]
            reports.append(handle.report())
    n, found = len(samples), accuracy(correct, [s.picture for s in samples])
    known = all(report.flops for report in reports)
    return Point(
        name, share, n, found.value, found.low, found.high, sum(r.tokens for r in reports) / n,
        sum(r.layer_averaged_tokens for r in reports) / n,
        sum(r.flops["full"] for r in reports) / n / 1e9 if known else None, sum(r.kv_bytes for r in reports) / n / 1024,
    )  # fmt: skip
