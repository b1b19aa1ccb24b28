# SPDX-License-Identifier: Apache-2.0
"""Compact tables of committed results inside Markdown pages, so that no number is copied by hand.

``python -m vlmcompress.eval.pages README.md docs/methods/*.md`` fills what stands between

    <!-- results/NAME: uncompressed, random, vtc-cls -->
    <!-- end -->

with the named methods of ``results/NAME/report.json`` (all of them where none is named), or, where ``results/NAME`` is a
file of ``vlmcompress bench methods`` or ``bench gpu``, with its speed ratios. ``<!-- families -->`` stands for a line per
family of the support matrix. A test holds the pages to it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..catalog import recorded
from .results import load_report
from .rows import UNCOMPRESSED
from .table import indistinct

#: where results lie, seen from this file
ROOT = Path(__file__).resolve().parents[1]
_FAMILIES = re.compile(r"(<!-- families -->\n).*?(<!-- end -->)", re.DOTALL)
_MARK = re.compile(r"(<!-- (results/[\w.-]+)(?:: ([^>]*?))? -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, root: Path = ROOT) -> str:
    """``text`` with every marked place holding its table as the results under ``root`` have it now.

    Raises ``ValueError`` for a mark that names a method which its results do not hold.
    """

    def table(found: re.Match) -> str:
        start, folder, names, end = found.groups()
        if (root / folder).is_file():
            bench = json.loads((root / folder).read_text())
            written = gpu_speeds(bench) if bench["schema"].startswith("vlmcompress.bench-gpu") else speeds(bench)
            return f"{start}{written}\n{end}"
        chosen = [name.strip() for name in names.split(",")] if names else None
        return f"{start}{compact(load_report(root / folder / 'report.json'), chosen)}\n{end}"

    text = _FAMILIES.sub(lambda found: f"{found[1]}{families()}\n{found[2]}", text)
    return _MARK.sub(table, text)


def families() -> str:
    """A line per family: how many of the methods in the support matrix work on its pictures and on its videos."""
    cells = recorded()
    columns = list(next(iter(cells.values())))

    def working(column: str) -> str:
        if column not in columns:
            return "–"
        return f"{sum(not row[column] for row in cells.values())} of {len(cells)} methods"

    lines = ["| `model_type` | pictures | videos |", "|---|---:|---:|"]
    lines += [
        f"| {name} | {working(name)} | {working(f'{name} video')} |" for name in columns if not name.endswith(" video")
    ]
    return "\n".join(lines)


def compact(report: dict[str, Any], methods: Sequence[str] | None = None) -> str:
    """Accuracy of each method by budget: a line per method, a column per task and budget, and how to read it.

    The budgets are those of the first method that was measured at several; a method's rows take the columns in their
    order. Where the decoder's layers see another number of tokens on average than the column says, it stands in
    brackets.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        rows.setdefault("uncompressed" if row["method"] == UNCOMPRESSED else row["method"], []).append(row)
    missing = [name for name in methods or () if name not in rows]
    if missing:
        raise ValueError(f"The results of {report['model']['name']} hold no row of {', '.join(missing)}.")
    keeps = next(([row["keep"] for row in found] for found in rows.values() if len(found) > 1), [None])
    everything = rows["uncompressed"][0]["tokens_in"]
    tasks = list(report["settings"]["tasks"])
    shown = {name: _columns(rows[name], len(keeps)) for name in methods or rows}
    budgets = [_budget(keep) for keep in keeps]
    head = [
        "% right",
        *(f"{task}, {budget}" if i == 0 else budget for task in tasks for i, budget in enumerate(budgets)),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, found in shown.items():
        cells = [_cell(row, task, keep, everything) for task in tasks for row, keep in zip(found, keeps, strict=True)]
        seeds = len(found[0]["seeds"]) if found[0] else 0
        lines.append(f"| {name}{f' ({seeds} seeds)' if seeds > 1 else ''} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _legend(report, shown.values(), tasks, everything)])


def speeds(bench: dict[str, Any]) -> str:
    """What ``vlmcompress bench methods`` found: a line per method, how much faster a whole prefill is and should be."""
    lines = ["| whole prefill | tokens per layer | times faster | FLOPs promise | share of it |", "|---|" + "---:|" * 4]
    for part in ("one_view", "tiled"):
        for name, row in bench[part]["methods"].items():
            lines.append(
                f"| {name} | {row['layer_average']:.0f} | {row['speedup']:.2f} | {row['predicted']:.2f} "
                f"| {row['of_predicted']:.2f} |"
            )
    one, tiled = (bench[part]["uncompressed"]["prefill_ms"] for part in ("one_view", "tiled"))
    machine = bench["environment"]
    legend = (
        f"{bench['shape']}; {bench['dtype'].removeprefix('torch.')}, {machine['threads']} threads of {machine['device']}. "
        f"Medians of {one['runs']} interleaved rounds ({tiled['runs']} for the tiled model, globalcom2): uncompressed "
        f"{one['median'] / 1000:.1f} and {tiled['median'] / 1000:.1f} s."
    )
    return "\n".join([*lines, "", legend])


def gpu_speeds(bench: dict[str, Any]) -> str:
    """What ``vlmcompress bench gpu`` found: a line per shape and batch, per method how many times faster."""
    measured = [cell for cell in bench["cells"] if "cases" in cell]
    names = list(dict.fromkeys(name for cell in measured for name in cell["cases"] if name != "uncompressed"))
    head = ["shape, batch", "visual tokens", "every token, ms", *(f"{name}, ×" for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for cell in measured:
        whole = cell["cases"]["uncompressed"]["ms"]["end_to_end"]["median"]
        cases = [cell["cases"].get(name) for name in names]
        faster = ["–" if case is None else f"{case['speedup']['end_to_end']:.2f}" for case in cases]
        lines.append(
            f"| {cell['shape']}, {cell['batch']} | {cell['visual_tokens']} | {whole:.0f} | {' | '.join(faster)} |"
        )
    machine = bench["environment"]
    legend = (
        f"Prefill and {bench['new_tokens']} tokens, {bench['text_tokens']} text tokens, {bench['dtype']}, {bench['weights']} "
        f"weights, eager PyTorch {machine['torch']}, transformers {machine['transformers']}, {machine['device']}; medians of "
        f"interleaved rounds."
    )
    return "\n".join([*lines, "", legend])


def _columns(rows: list[dict[str, Any]], width: int) -> list[dict[str, Any] | None]:
    """A method's rows by column: one row stands in all of them, too few leave the last ones empty."""
    found = rows * width if len(rows) == 1 else rows[:width]
    return [*found, *[None] * (width - len(found))]


def _budget(keep: int | float | None) -> str:
    return "all" if keep is None else f"{keep} tokens" if isinstance(keep, int) else f"{keep:.0%}"


def _cell(row: dict[str, Any] | None, task: str, keep: int | float | None, everything: float) -> str:
    if row is None or "tasks" not in row:
        return "–"
    text = f"{100 * row['tasks'][task]['accuracy']:.1f}{' ≈' * indistinct(row, task)}"
    wanted = keep if isinstance(keep, int) else (keep or 1.0) * everything
    if row["keep"] is not None and abs(row["layer_tokens"] - wanted) > 0.02 * everything:
        text += f" ({row['layer_tokens']:.0f})"
    return text


def _legend(report: dict[str, Any], shown: Any, tasks: list[str], everything: float) -> str:
    results = [row["tasks"][t] for found in shown for row in found if row and "tasks" in row for t in tasks]
    widest = max(max(r["high"] - r["accuracy"], r["accuracy"] - r["low"]) for r in results)
    counts = " and ".join(f"{n:,} questions of {task}" for task, n in report["settings"]["tasks"].items())
    return (
        f"{report['model']['name']}, {everything:.0f} visual tokens uncompressed, {counts}. In brackets: tokens that a "
        "decoder layer sees on average, where that is not the column's budget. ≈: cannot be told from uncompressed. "
        f"95 % intervals reach at most {100 * widest:.1f} points to a side."
    )


def main(paths: Sequence[str]) -> None:
    """Fill the pages in place."""
    for path in map(Path, paths):
        before = path.read_text()
        after = fill(before)
        if after != before:
            path.write_text(after)
            print(f"{path}: tables brought up to date")


if __name__ == "__main__":
    main(sys.argv[1:])
