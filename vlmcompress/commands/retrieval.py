# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress retrieval``: recall of text–video search with methods in an open_clip tower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

COLUMNS = {
    "text_to_video_r1": "text→video R@1",
    "text_to_video_r5": "R@5",
    "video_to_text_r1": "video→text R@1",
    "video_to_text_r5": "R@5",
}


def retrieval(model: str, rows: Sequence[str], videos: int, out: Path) -> dict[str, Any]:
    """Measure ``rows`` (default: those of :data:`vlmcompress.eval.retrieval.ROWS`), print, and write the file ``out``."""
    import torch

    from ..eval import results
    from ..eval.retrieval import ROWS, load, measure
    from ..eval.rows import parse_row
    from ..eval.store import write_json

    if out.is_dir():
        raise ValueError(f"The result cannot go to {out}: it is a folder, not a file.")
    if videos < 2:
        raise ValueError(f"Search needs at least two videos, not {videos}.")
    plan = [parse_row(text) for text in (rows or ROWS)]
    if all(row.method != "none" for row in plan):
        plan.insert(0, parse_row("none"))
    encoder, console = load(model), Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("videos", total=len(plan) * videos)
        found = measure(encoder, plan, videos, lambda row, n: progress.update(bar, description=row, advance=n))
    asked = "".join(f" --row '{text}'" for text in rows)
    report = {
        "schema": "vlmcompress.retrieval/1",
        "command": f"vlmcompress retrieval {model}{asked} --videos {videos} --threads {torch.get_num_threads()} --out {out}",
        "environment": results.environment(),
        "rows": found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    console.print(_table(found, videos))
    console.print(f"Written: {out}", highlight=False)
    return report


def _table(found: list[dict[str, Any]], videos: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=f"{videos} videos of 8 frames", title_justify="left")
    for column in ("", *COLUMNS.values(), "FLOPs", "ms"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for row in found:
        shown = [f"{row['recall'][name]['value']:.1f}" for name in COLUMNS]
        name = " ".join([row["method"], *(f"{option}={value}" for option, value in row["options"].items())])
        table.add_row(name, *shown, f"{row['flops_share']:.0%}", f"{row['ms_per_video']:.1f}")
    table.caption = "FLOPs of the tower's layers; ms of the tower per video; 95 % intervals are in the file"
    return table
