# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress reproduce``: a published table, ours beside theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..eval.reproduce import Machine


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line.

    ``table``: a shipped table or the path of a CSV file; ``model``: a copy of the checkpoint elsewhere; ``rows``: such as
    "flowcut 64", the uncompressed ones are always among them; ``benchmarks``: names. Empty means all.
    """

    table: str
    model: str | None
    rows: str
    benchmarks: str
    out: Path
    machine: Machine


def list_tables() -> None:
    """What can be reproduced, on the terminal."""
    from ..eval import tables

    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("table", "checkpoint", "rows", "measured", "not measured"):
        shown.add_column(column, no_wrap=column in ("table", "checkpoint"))
    for name in tables.names():
        table = tables.read(name)
        rows = dict.fromkeys(" ".join(c.row) for c in table.cells if table.run(c.row) and c.method != "none")
        kinds: dict[bool, dict[str, None]] = {True: {}, False: {}}
        for cell in table.cells:
            if not cell.averages and table.run(cell.row):
                kinds[not table.why_not(cell)][cell.benchmark] = None
        shown.add_row(name, table.pins.checkpoint, ", ".join(rows), ", ".join(kinds[True]), ", ".join(kinds[False]))
    Console(width=max(Console().width, 130)).print(shown)


def reproduce(settings: Settings) -> int:
    """Run, print, write ``out/reproduction.json``; 0 when every value that was judged is met, else 1.

    Raises ``ValueError`` in one sentence, before anything is run, for what cannot be reached or is not there.
    """
    import torch

    from ..eval import reproduce as run
    from ..eval import tables
    from ..eval.schema import Reproduction, check
    from ..eval.store import write_json
    from ..eval.workers import refuse_foreign_launch

    if torch.distributed.is_torchelastic_launched():
        raise ValueError("reproduce starts its processes itself: --processes N.")
    refuse_foreign_launch()
    table = _chosen(tables.read(settings.table), settings)
    pinned = table.tasks()
    if not pinned:
        raise ValueError(f"Nothing of '{settings.table}' that was asked for can be measured here.")
    local = Path(settings.model or table.pins.checkpoint)
    checkpoint = str(local.resolve()) if local.is_dir() else settings.model or table.pins.checkpoint
    files = run.base_files(pinned)
    configs = run.configurations(files)
    missing, why = run.unreachable(checkpoint, configs)
    if missing:
        raise ValueError(f"Nothing was run, for these are out of reach: {', '.join(missing)} ({why}).")
    if settings.machine.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("There is no GPU here; --device cpu works, slowly.")
    out = settings.out.resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"The results cannot go to {out}: it is a file, not a folder.")
    run.pin(out / "tasks", pinned, files, configs)
    found: dict[tuple[str, str], Any] = {}
    console = Console()
    for row in dict.fromkeys(cell.row for cell in table.cells if table.run(cell.row)):
        folder = out / "rows" / run.slug(row)
        asked = run.command(
            checkpoint, table.run(row), table.protocol.model_args, list(pinned), out, folder, settings.machine
        )
        with console.status(f"{' '.join(row)}: {len(pinned)} tasks"):
            found[row] = _row(run, folder, asked, console)
    entries = run.judge(table, found, settings.machine.limit)
    report = run.as_report(table, entries, checkpoint, settings.machine)
    check(Reproduction, report, out / "reproduction.json")
    write_json(out / "reproduction.json", report)
    Console(width=max(console.width, 130)).print(_table(report))
    console.print(f"Written: {out}/reproduction.json", highlight=False)
    verdicts = {e["verdict"] for e in entries}
    return 0 if "met" in verdicts and not verdicts & {"above", "below", "failed"} else 1


def _row(run: Any, folder: Path, asked: list[str], console: Console) -> Any:
    """The scores of one row, or why there are none: the other rows go on."""
    try:
        return run.run_row(folder, asked)
    except ValueError as error:
        if "another configuration" in str(error):
            raise
        console.print(str(error), style="red", markup=False, highlight=False)
        return str(error)


def _chosen(table: Any, settings: Settings) -> Any:
    """The table with the rows and benchmarks that were asked for; ``ValueError`` for one that it does not have."""
    from dataclasses import replace

    rows = [text.strip() for text in settings.rows.split(",") if text.strip()]
    benchmarks = [text.strip() for text in settings.benchmarks.split(",") if text.strip()]
    known_rows = {" ".join(c.row) for c in table.cells}
    known = {c.benchmark for c in table.cells if not c.averages}
    for asked, there, what in ((rows, known_rows, "row"), (benchmarks, known, "benchmark")):
        for name in asked:
            if name not in there:
                raise ValueError(f"'{table.name}' has no {what} '{name}'; it has {', '.join(sorted(there))}.")
    cells = (
        c
        for c in table.cells
        if (not rows or c.method == "none" or " ".join(c.row) in rows)
        and (not benchmarks or c.averages or c.benchmark in benchmarks)
    )
    return replace(table, cells=tuple(cells))


def _table(report: dict[str, Any]) -> Table:
    limit = "" if report["limit"] is None else f", the first {report['limit']} questions of each task"
    table = Table(title=f"{report['table']}{limit}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("row", "benchmark", "source", "theirs", "ours", "difference", "allowed", "verdict"):
        table.add_column(column, justify="right" if column in ("theirs", "ours", "difference", "allowed") else "left")
    for e in report["cells"]:
        name = e["benchmark"] if "columns" not in e else f"average of {len(e['columns'])} columns"
        numbers = ["" if e[k] is None else f"{e[k]:{f}}" for k, f in _FORMATS]
        table.add_row(
            f"{e['method']} {e['tokens']}",
            name,
            e["source"],
            *numbers,
            e["verdict"] + (e["reason"] and f": {e['reason']}"),
        )
    table.caption = report["about"]
    return table


_FORMATS = (("theirs", ",.1f"), ("ours", ",.1f"), ("difference", "+,.1f"), ("allowed", ",.1f"))
