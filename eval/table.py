# SPDX-License-Identifier: Apache-2.0
"""The table of a report, for the terminal and as Markdown."""

from __future__ import annotations

from typing import Any

Cells = list[str]


def header(report: dict[str, Any]) -> Cells:
    tasks = [f"{task} (n={n})" for task, n in report["settings"]["tasks"].items()]
    columns = [column for task in tasks for column in (f"{task} % [95 %]", "of uncompressed %")]
    return ["method", "keep", *columns, "visual tokens", "layer average", "MFLOPs", "prefill ms", "decode ms/token",
            "KV KiB"]  # fmt: skip


def cells(row: dict[str, Any], tasks: list[str]) -> Cells:
    """One row in the order of :func:`header`; a failed row has dashes."""
    name = "uncompressed" if row["method"] == "none" else row["method"]
    if row["options"]:
        name += " " + ", ".join(f"{k}={v}" for k, v in sorted(row["options"].items()))
    if len(row["seeds"]) > 1:
        name += f" ×{len(row['seeds'])} seeds"
    keep = "" if row["keep"] is None else str(row["keep"])
    if "tasks" not in row:
        return [name, keep, *["failed" if not i else "–" for i in range(2 * len(tasks) + 6)]]
    found = [name, keep]
    for task in tasks:
        found += _task(row["tasks"][task])
    timing = row["timing"]
    found += [f"{row['tokens_in']:.0f}", f"{row['layer_tokens']:.1f}", f"{row['full'] / 1e6:,.0f}"]
    for clock in ("prefill_ms", "decode_ms_per_token"):
        found.append(f"{timing[clock]['median']:.1f}" if timing else "–")
    return [*found, f"{row['kv_bytes'] / 1024:,.0f}"]


def _task(task: dict[str, Any]) -> Cells:
    spread = "" if task["sd_over_seeds"] is None else f" ± {100 * task['sd_over_seeds']:.1f}"
    accuracy = f"{100 * task['accuracy']:.1f}{spread} [{100 * task['low']:.1f}, {100 * task['high']:.1f}]"
    kept = task["retained"]
    if kept is None:
        return [accuracy, "–"]
    # an interval that holds 100 % cannot be told from the uncompressed model on these questions
    same = " ≈" if kept["low"] <= 1 <= kept["high"] and kept["low"] < kept["high"] else ""
    return [accuracy, f"{100 * kept['value']:.1f}{same}"]


def markdown(report: dict[str, Any]) -> str:
    """The table and what one must know to read it."""
    tasks = list(report["settings"]["tasks"])
    head = header(report)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    lines += ["| " + " | ".join(cells(row, tasks)) + " |" for row in report["rows"]]
    return "\n".join(lines)


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
    found += [f"Failed: {row['key']}: {row['error']}" for row in report["rows"] if row["error"]]
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
        table.add_row(*cells(row, tasks), style="red" if row["error"] else None)
    return table
