# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench selection``: what choosing spread-out tokens costs, by the width of the features."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .bench import result_path

if TYPE_CHECKING:
    from ..eval.selection import Shape

#: milliseconds that max-sum may take for the batch; the task names no width
TARGETS = {"maxsum_ms": 30.0}


def bench_selection(out: Path, rounds: int, device: str, shape: Shape | None = None) -> dict[str, Any]:
    """Measure, print, and write ``out/bench-selection-DEVICE-torchVERSION.json``; ``shape`` as in ``Shape()`` by default."""
    import torch

    from ..eval import results, selection
    from ..eval.store import write_json

    path = result_path(out, "bench-selection", device)
    shape = shape or selection.Shape()
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("choices", total=(rounds + 1) * 6 * len(shape.widths))

        def tick() -> None:
            progress.advance(bar)

        found = [selection.selection(shape, width, rounds, device, tick) for width in shape.widths]
    report = {
        "schema": "vlmcompress.bench-selection/1",
        "command": f"vlmcompress bench selection --rounds {rounds} --threads {torch.get_num_threads()} --device {device}",
        "environment": results.environment(device),
        "shape": str(shape),
        "clock": "processor time" if device == "cpu" and torch.get_num_threads() == 1 else "time of day",
        "rounds": rounds,
        "targets": TARGETS,
        "widths": found,
    }
    write_json(path, report)
    console.print(_table(report))
    console.print(f"Written: {path}", highlight=False)
    return report


def _table(report: dict[str, Any]) -> Table:
    names = ("maxsum", "kcenter", "noise", "step by step", "reading", "products")
    table = Table(box=box.SIMPLE_HEAD, title=report["shape"], title_justify="left")
    for column in ("width", *(f"{name}, ms" for name in names), "GFLOP", "same order"):
        table.add_column(column, justify="right")
    for row in report["widths"]:
        times = (f"{row['ms'][name]['median']:.1f}" for name in names)
        table.add_row(f"{row['width']:,}", *times, f"{row['gflop']:.1f}", f"{row['same_order']:.1%}")
    table.caption = (
        "medians; noise: maxsum of features without clusters; reading: the lengths of all tokens; products: the chosen "
        "tokens' cosines in one product"
    )
    return table
