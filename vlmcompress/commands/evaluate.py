# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress eval``: rows × tasks, resumable, then the clocks, then the report."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

COMPARED = (
    "Hard questions: those that the picture shrunk to the same budget gets wrong. Equal tokens, equal FLOPs: accuracy "
    "minus that of the strongest of random, grid, pool and resize at the same layer average and at the same prefill; "
    "between its budgets a baseline is a straight line that ends in the uncompressed model. ≈: the interval holds 0."
)


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line.

    ``tasks``: names, each with a number of questions of its own where one is given (``easy-vqa:1200``); ``limit``: the
    number for the others, None for all. ``rows``: further rows, see :func:`vlmcompress.eval.rows.parse_row`.
    """

    model: str
    methods: str
    keep: str
    tasks: str
    limit: int | None
    out: Path
    seeds: int
    batch_size: int
    max_new_tokens: int
    rounds: int
    device: str
    rows: tuple[str, ...] = ()


def evaluate(settings: Settings) -> dict[str, Any] | None:
    """Run what ``settings.out`` does not hold yet, print the table, write report.json, report.md and frontier.png.

    Under ``accelerate launch`` the processes share the questions; the first one alone writes and returns the report.
    """
    # before hours are spent: the packages that the report needs at the very end
    for package in ("matplotlib", "scipy", "pydantic"):
        import_module(package)
    from ..eval import chart, results, table
    from ..eval.loading import fingerprint, load
    from ..eval.rows import STANDARD, parse_keep, parse_row, plan
    from ..eval.store import Store, write_json
    from ..eval.tasks import load as load_task
    from ..eval.workers import refuse_foreign_launch, workers

    refuse_foreign_launch()
    names = STANDARD if settings.methods == "standard" else split(settings.methods, "methods")
    keeps = [parse_keep(k) for k in split(settings.keep, "keep")]
    seeds = range(settings.seeds)
    rows = plan(names, keeps, seeds, [parse_row(text, seeds) for text in settings.rows])
    limits = dict(task_and_limit(text, settings.limit) for text in split(settings.tasks, "tasks"))
    samples = {task: load_task(task, limit=limit) for task, limit in limits.items()}
    team = workers(settings.device)
    model, processor = load(settings.model, device=team.device)
    configuration = {
        "model": fingerprint(settings.model),
        "tasks": {task: len(found) for task, found in samples.items()},
        "max_new_tokens": settings.max_new_tokens,
        "dtype": str(model.dtype),
    }
    store = Store(settings.out, configuration) if team.main else None
    console = Console(quiet=not team.main)
    errors, timings, unclocked = _measure(settings, model, processor, rows, samples, store, team, console)
    if store is None:
        return None
    table_rows = results.summarize(
        store, rows, list(samples), errors=errors, timings=timings, expected=sum(map(len, samples.values())),
        totals={task: found[0].aggregate for task, found in samples.items()}, unclocked=unclocked,
    )  # fmt: skip
    report = {
        "schema": results.SCHEMA,
        "model": {
            "name": Path(settings.model).name,
            "fingerprint": configuration["model"],
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": configuration["dtype"],
        },
        "settings": {
            "tasks": configuration["tasks"],
            "limits": limits,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            "rounds": settings.rounds,
        },
        "environment": results.environment(team.device) | {"processes": team.size},
        "ties": results.add_comparisons(store, rows, table_rows),
        "rows": table_rows,
    }
    write_json(settings.out / "report.json", report)
    notes = table.notes(report)
    compared = table.comparisons(report)
    text = [f"# {report['model']['name']}", table.markdown(report), *notes, "![accuracy against FLOPs](frontier.png)"]
    text += [compared, COMPARED] * bool(compared) + table.warnings(report)
    (settings.out / "report.md").write_text("\n\n".join(text) + "\n")
    chart.frontier(report, settings.out / "frontier.png")
    Console(width=max(console.width, 150)).print(table.terminal(report))
    for note in [*notes, *table.warnings(report)]:
        console.print(note, markup=False, highlight=False)
    console.print(f"Written: {settings.out}/report.json, report.md, frontier.png", highlight=False)
    return report


def split(text: str, what: str) -> list[str]:
    """The comma-separated names; ``ValueError`` when there is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--{what} names nothing; it takes a comma-separated list.")
    return list(dict.fromkeys(names))


def task_and_limit(text: str, limit: int | None) -> tuple[str, int | None]:
    """``"scenes"`` or ``"easy-vqa:1200"`` → the task and the number of questions (None: all of them)."""
    name, colon, number = text.partition(":")
    if not colon:
        return name, limit
    if not number.isdecimal():
        raise ValueError(f"A task is NAME or NAME:QUESTIONS, not '{text}'.")
    return name, int(number)


def _measure(
    settings, model, processor, rows, samples, store, team, console
) -> tuple[dict[str, str], dict[str, Any], dict[str, str]]:
    """The two phases under one progress bar each: answers, then clocks of the rows that answered.

    Errors by run key, clocks by row key, errors of clocks by row key.
    """
    from ..eval.runner import run_rows, time_rows

    columns = (
        TextColumn("{task.description:<24}"), BarColumn(bar_width=40), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    runs = sum(len(row.seeds) for row in rows)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("answers", total=runs * sum(map(len, samples.values())))

        def answered(row: str, n: int) -> None:
            progress.update(bar, description=row, advance=n)

        errors = run_rows(
            model, processor, rows, samples, store,
            batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens, workers=team, tick=answered,
        )  # fmt: skip
        progress.update(bar, description="answers")
        if not settings.rounds or not team.main:
            return errors, {}, {}
        rows = [row for row in rows if not any(row.run_key(seed) in errors for seed in row.seeds)]
        clock = progress.add_task("clocks", total=3 * len(rows) * (settings.rounds + 2))
        first = next(iter(samples.values()))[0]
        timings, failed = time_rows(
            model, processor, rows, first, rounds=settings.rounds, tick=lambda: progress.advance(clock)
        )
        progress.update(clock, completed=3 * len(rows) * (settings.rounds + 2))
    return errors, timings, failed
