# SPDX-License-Identifier: Apache-2.0
"""The table of a report, for the terminal and as Markdown."""

from __future__ import annotations

from typing import Any

from .rows import UNCOMPRESSED

Cells = list[str]


def header(report: dict[str, Any]) -> Cells:
    tasks = [f"{task} (n={n})" for task, n in report["settings"]["tasks"].items()]
    columns = [column for task in tasks for column in (f"{task} % [95 %]", "of uncompressed %")]
    return ["method", "keep", *columns, "visual tokens", "layer average", "MFLOPs", "prefill ms", "decode ms/token",
            "KV KiB"]  # fmt: skip


def cells(row: dict[str, Any], tasks: list[str]) -> Cells:
    """One row in the order of :func:`header`; a failed row has dashes."""
    name = "uncompressed" if row["method"] == UNCOMPRESSED else row["method"]
    if row["options"]:
        name += " " + ", ".join(f"{k}={v}" for k, v in sorted(row["options"].items()))
    if len(row["seeds"]) > 1:
        name += f" ×{len(row['seeds'])} seeds"
    keep = "" if row["keep"] is None else str(row["keep"])
    if "tasks" not in row:
        return [name, keep, *["failed" if not i else "–" for i in range(2 * len(tasks) + 6)]]
    found = [name, keep]
    for task in tasks:
        found += _task(row, task)
    timing = row["timing"]
    found += [f"{row['tokens_in']:.0f}", f"{row['layer_tokens']:.1f}", f"{row['full'] / 1e6:,.0f}"]
    for clock in ("prefill_ms", "decode_ms_per_token"):
        found.append(f"{timing[clock]['median']:.1f}" if timing else "–")
    return [*found, f"{row['kv_bytes'] / 1024:,.0f}"]


def indistinct(row: dict[str, Any], task: str) -> bool:
    """Whether a row cannot be told from the uncompressed model on a task: its interval holds 100 %."""
    kept = row["tasks"][task]["retained"]
    return row["method"] != UNCOMPRESSED and kept is not None and kept["low"] <= 1 <= kept["high"]


def _task(row: dict[str, Any], name: str) -> Cells:
    task = row["tasks"][name]
    spread = "" if task["sd_over_seeds"] is None else f" ± {100 * task['sd_over_seeds']:.1f}"
    accuracy = f"{100 * task['accuracy']:.1f}{spread} [{100 * task['low']:.1f}, {100 * task['high']:.1f}]"
    kept = task["retained"]
    if kept is None:
        return [accuracy, "–"]
    return [accuracy, f"{100 * kept['value']:.1f}{' ≈' * indistinct(row, name)}"]


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    tasks = list(report["settings"]["tasks"])
    head = header(report)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    lines += ["| " + " | ".join(cells(row, tasks)) + " |" for row in report["rows"]]
    return "\n".join(lines)


def comparisons(report: dict[str, Any]) -> str:
    """Hard questions and equal cost, one line per row with a budget; empty where nothing could be compared."""
    tasks = list(report["settings"]["tasks"])
    head = ["method", "keep"]
    for task in tasks:
        head += [f"{task}: hard questions % [95 %] (n; uncompressed)", "equal tokens, points", "equal FLOPs, points"]
    lines = []
    for row in report["rows"]:
        if row["keep"] is None or not any(t.get("hard") or t.get("equal") for t in row.get("tasks", {}).values()):
            continue
        line = [row["method"], str(row["keep"])]
        for task in tasks:
            found = row["tasks"][task]
            line += [
                _hard(found.get("hard")),
                *(_equal(found.get("equal", {}).get(c, {})) for c in ("layer_tokens", "full")),
            ]
        lines.append("| " + " | ".join(line) + " |")
    if not lines:
        return ""
    rule = "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *lines])


def _hard(hard: dict[str, Any] | None) -> str:
    if hard is None:
        return "–"
    whole = "–" if hard["uncompressed"] is None else f"{100 * hard['uncompressed']:.1f}"
    interval = f"[{100 * hard['low']:.1f}, {100 * hard['high']:.1f}]"
    return f"{100 * hard['accuracy']:.1f} {interval} ({hard['n']}; {whole})"


def _equal(found: dict[str, dict[str, float]]) -> str:
    """The difference to the baseline that is hardest to beat there, and its name; ≈ where it may be none."""
    if not found:
        return "–"
    base, gap = min(found.items(), key=lambda item: item[1]["value"])
    same = " ≈" if gap["low"] <= 0 <= gap["high"] else ""
    return f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]{same} {base}"


def warnings(report: dict[str, Any]) -> list[str]:
    """Which rows cannot be told from the best one of their budget, and which rows answer nothing."""
    found = []
    for row in report["rows"]:
        silent = [task for task, result in row.get("tasks", {}).items() if result.get("empty", 0) > 0.5]
        if silent:
            name = "The uncompressed model" if row["method"] == "none" else row["key"]
            found.append(f"{name} answers nothing to most questions of {', '.join(silent)}: its numbers mean little.")
    budgets = dict.fromkeys((tie["task"], tie["keep"]) for tie in report.get("ties", []))
    for task, keep in budgets:
        mine = [r for r in report["rows"] if r["keep"] == keep and "tasks" in r]
        best = max(mine, key=lambda r: r["tasks"][task]["accuracy"])["key"]
        pairs = [tie["rows"] for tie in report["ties"] if (tie["task"], tie["keep"]) == (task, keep)]
        others = [other for pair in pairs if best in pair for other in pair if other != best]
        if others:
            found.append(f"{task}, keep {keep}: the best row, {best}, cannot be told apart from {', '.join(others)}.")
    return found


def notes(report: dict[str, Any]) -> list[str]:
    """What the columns mean, where the numbers were taken and which rows failed."""
    machine, settings = report["environment"], report["settings"]
    asked = ", ".join(
        f"all questions of {task}" if limit is None else f"a fixed subset of {settings['tasks'][task]:,} of {task}"
        for task, limit in settings["limits"].items()
    )
    found = [
        f"Asked: {asked}. Intervals resample images; ‘of uncompressed’ is paired with the uncompressed row of this "
        "run, and ≈ marks rows whose interval holds 100 %.",
        "MFLOPs: the whole prefill of one prompt (tower, compressor, projector, all tokens, one lm_head position). "
        "Layer average: visual tokens that a decoder layer sees on average. KV: after the prefill, text included.",
        f"Clocks: medians of {settings['rounds']} interleaved runs, one image at a time, on {machine['device']} with "
        f"{machine['threads']} thread(s), torch {machine['torch']}, transformers {machine['transformers']}.",
    ]
    found += [
        f"{'No clock' if 'tasks' in row else 'Failed'}: {row['key']}: {row['error']}"
        for row in report["rows"]
        if row["error"]
    ]
    return found


def terminal(report: dict[str, Any]):
    """The same table for rich, narrow enough for 120 columns with two tasks."""
    from rich import box
    from rich.table import Table

    tasks = list(report["settings"]["tasks"])
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(header(report)):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=False, overflow="fold")
    before = None
    for row in report["rows"]:
        if before is not None and row["method"] != before:
            table.add_section()
        before = row["method"]
        table.add_row(*cells(row, tasks), style=None if "tasks" in row else "red")
    return table
