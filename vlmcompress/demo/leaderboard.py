# SPDX-License-Identifier: Apache-2.0
"""The committed measurements (``results/*/report.json``) as one list of rows to filter and to sort."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ALL = "all"


@dataclass(frozen=True)
class Line:
    """One row of a report on one task. ``accuracy`` and its interval are shares; clocks None where none were taken."""

    source: str
    model: str
    task: str
    questions: int
    method: str
    keep: str
    accuracy: float
    low: float
    high: float
    retained: float | None
    tokens: float
    mflops: float
    prefill_ms: float | None
    kv_kib: float
    command: str


#: what the table can be sorted by: words → (key, largest first)
ORDERS: dict[str, tuple[Callable[[Line], Any], bool]] = {
    "accuracy": (lambda line: line.accuracy, True),
    "visual tokens": (lambda line: line.tokens, False),
    "FLOPs": (lambda line: line.mflops, False),
    "prefill": (lambda line: (line.prefill_ms is None, line.prefill_ms or 0.0), False),
    "method": (lambda line: (line.method, -line.tokens), False),
}
HEAD = ("method", "keep", "accuracy % [95 %]", "task", "model", "of uncompressed %", "layer average", "MFLOPs",
        "prefill ms", "KV KiB", "measured in")  # fmt: skip


def read(folder: Path) -> list[Line]:
    """Every finished row of the reports under ``folder``; a damaged report is left out. Empty without results."""
    from ..eval.results import load_report

    lines = []
    for path in sorted(folder.glob("*/report.json")):
        try:
            lines += _lines(path.parent.name, load_report(path))
        except (ValueError, KeyError, TypeError):  # a report of another version must not close the page
            continue
    return lines


def _lines(source: str, report: dict[str, Any]) -> list[Line]:
    found = []
    for row in report["rows"]:
        for task, result in row.get("tasks", {}).items():
            timing = row["timing"]
            name = "uncompressed" if row["method"] == "none" else row["method"]
            if row["options"]:
                name += " " + " ".join(f"{key}={value}" for key, value in sorted(row["options"].items()))
            found.append(
                Line(
                    source, report["model"]["name"], task, result["n"], name, "" if row["keep"] is None else str(row["keep"]),
                    result["accuracy"], result["low"], result["high"],
                    result["retained"]["value"] if result["retained"] else None, row["layer_tokens"], row["full"] / 1e6,
                    timing["prefill_ms"]["median"] if timing else None, row["kv_bytes"] / 1024, command(report, row, task),
                )
            )  # fmt: skip
    return found


def command(report: dict[str, Any], row: dict[str, Any], task: str) -> str:
    """The ``vlmcompress eval`` that measures a row (and the uncompressed model) again on one task."""
    settings, name = report["settings"], report["model"]["name"]
    from .models import SHIPPED

    model = f"assets/models/{name}" if (SHIPPED / name).is_dir() else name
    words = ["vlmcompress", "eval", model]
    if row["options"]:
        options = {"keep": row["keep"]} if row["keep"] is not None else {}
        options |= row["options"]
        pairs = " ".join(f"{key}={str(value).replace(' ', '')}" for key, value in options.items())
        words += ["--methods", "none", "--row", f"{row['method']} {pairs}"]
    else:
        words += ["--methods", row["method"]]
        if row["keep"] is not None:
            words += ["--keep", str(row["keep"])]
    limit = settings["limits"][task]
    words += ["--tasks", task, *(["--full"] if limit is None else ["--limit", str(limit)])]
    words += ["--max-new-tokens", str(settings["max_new_tokens"]), "--batch-size", str(settings["batch_size"])]
    return shlex.join(words)


def choices(lines: list[Line]) -> dict[str, list[str]]:
    """Values to filter by, "all" first: of ``model``, ``task`` and ``keep`` (large budgets first)."""
    found = {name: sorted({getattr(line, name) for line in lines}) for name in ("model", "task")}
    keeps = {line.keep for line in lines if line.keep}
    found["keep"] = sorted(keeps, key=lambda keep: (float(keep) <= 1, -float(keep)))
    return {name: [ALL, *values] for name, values in found.items()}


def select(
    lines: list[Line], model: str = ALL, task: str = ALL, keep: str = ALL, order: str = "accuracy"
) -> tuple[list[list[str]], list[str]]:
    """Cells in the order of ``HEAD`` and the command of each row, filtered and sorted.

    Rows without a budget (uncompressed, no vision) stay whatever budget is asked for: they are what the others are
    held against. Raises ``ValueError`` for an unknown order.
    """
    if order not in ORDERS:
        raise ValueError(f"The table can be sorted by {', '.join(ORDERS)}, not by '{order}'.")
    key, largest_first = ORDERS[order]
    shown = [
        line for line in lines
        if model in (ALL, line.model) and task in (ALL, line.task) and (keep == ALL or line.keep in ("", keep))
    ]  # fmt: skip
    shown.sort(key=key, reverse=largest_first)
    return [_cells(line) for line in shown], [line.command for line in shown]


def _cells(line: Line) -> list[str]:
    return [
        line.method, line.keep, f"{100 * line.accuracy:.1f} [{100 * line.low:.1f}, {100 * line.high:.1f}]",
        f"{line.task} (n={line.questions:,})", line.model,
        "–" if line.retained is None else f"{100 * line.retained:.1f}", f"{line.tokens:.1f}", f"{line.mflops:,.0f}",
        "–" if line.prefill_ms is None else f"{line.prefill_ms:.1f}", f"{line.kv_kib:,.0f}", line.source,
    ]  # fmt: skip
