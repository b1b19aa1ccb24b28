# SPDX-License-Identifier: Apache-2.0
"""Run a published table through lmms-eval and set its numbers beside ours.

Every published row is one run of the real ``lmms_eval`` in a process of its own, with our model entry point. The prompts
are pinned by task files that include lmms-eval's own ones and override what stands around the question.
"""

from __future__ import annotations

import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lmms import TASKS
from .loading import first_sentence
from .results import environment
from .store import read_json, write_json
from .tables import RATIOS, Benchmark, Cell, Run, Table

SCHEMA = "vlmcompress.reproduction/1"
PINNED = "pinned_"
#: (value, standard error) of each metric of each task
Scores = Mapping[str, Mapping[str, tuple[float, float | None]]]


@dataclass(frozen=True)
class Machine:
    """Where and how much: ``limit`` questions per task (None: all), ``processes`` by accelerate."""

    device: str = "cuda"
    batch_size: int = 16
    limit: int | None = None
    processes: int = 1


# what is out of reach -------------------------------------------------------------------------------------------------
def unreachable(checkpoint: str, configurations: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], str]:
    """The checkpoint and the data sets of the tasks that neither this machine nor the hub has, and the first reason."""
    wanted = {} if Path(checkpoint).is_dir() else {("model", checkpoint): f"the checkpoint {checkpoint}"}
    for task, config in configurations.items():
        data = config.get("dataset_path", "")
        if "data_files" not in (config.get("dataset_kwargs") or {}) and not Path(data).exists():
            wanted.setdefault(("dataset", data), f"the data of {task} ({data})")
    found = {text: _why_missing(*repository) for repository, text in wanted.items()}
    missing = {text: why for text, why in found.items() if why}
    return list(missing), next(iter(missing.values()), "")


def _why_missing(kind: str, name: str) -> str:
    from huggingface_hub import HfApi, constants

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=10)
        return ""
    # no network, no such repository, no right to read it: what the local cache holds does all the same
    except Exception as error:
        cached = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "snapshots"
        return "" if cached.is_dir() else first_sentence(error)


# the tasks ------------------------------------------------------------------------------------------------------------
def base_files(tasks: Iterable[str]) -> dict[str, Path]:
    """The YAML file of each task, ours or lmms-eval's. Raises ``ValueError`` for a task that neither has."""
    from .lmms.documents import task_manager

    found = {task: TASKS / f"{task}.yaml" for task in tasks}
    foreign = [task for task, file in found.items() if not file.is_file()]
    if foreign:
        index = task_manager().task_index
        unknown = [task for task in foreign if index.get(task, {}).get("type") != "task"]
        if unknown:
            raise ValueError(f"This version of lmms-eval has no task {', '.join(unknown)}.")
        found |= {task: Path(index[task]["yaml_path"]) for task in foreign}
    return found


def configurations(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What the YAML files say, functions left out."""
    from lmms_eval.utils import load_yaml_config

    return {task: load_yaml_config(str(file), mode="simple") for task, file in files.items()}


def pin(folder: Path, tasks: Mapping[str, Benchmark], files: Mapping[str, Path], configs: Mapping[str, Any]) -> None:
    """Write a task file for each task under ``folder`` that fixes the prompt, whatever lmms-eval's default becomes."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    for task, benchmark in tasks.items():
        fixed: dict[str, Any] = {"include": str(files[task].resolve()), "task": PINNED + task}
        if benchmark.prompt is not None:
            fixed["lmms_eval_specific_kwargs"] = {"default": benchmark.prompt}
        data = dict(configs[task].get("dataset_kwargs") or {})
        if data.pop("token", None):  # public data; with it the library insists on a log-in
            fixed["dataset_kwargs"] = data
        (folder / f"{PINNED}{task}.yaml").write_text(yaml.safe_dump(fixed, allow_unicode=True))


# the runs -------------------------------------------------------------------------------------------------------------
def command(
    checkpoint: str,
    run: Run,
    model_args: Mapping[str, Any],
    tasks: Sequence[str],
    out: Path,
    row: Path,
    machine: Machine,
) -> list[str]:
    """The command line of lmms-eval for one row; ``out`` holds the pinned tasks, ``row`` takes the output.

    Raises ``ValueError`` for an argument that lmms-eval's command line could not carry.
    """
    arguments = {"pretrained": checkpoint, "method": run.method, **dict(model_args), **run.options}
    if run.keep is not None:
        arguments["keep"] = run.keep
    if "system_prompt" in arguments:  # has commas, which would end the argument; the model also takes a file
        file = out / "system_prompt.txt"
        file.write_text(arguments["system_prompt"])
        arguments["system_prompt"] = file
    unfit = [name for name, value in arguments.items() if {",", "="} & set(str(value))]
    if unfit:
        raise ValueError(
            f"lmms-eval cannot be told {', '.join(unfit)}: its model_args hold no commas and equals signs."
        )
    launch = [sys.executable, "-m", "lmms_eval"]
    if machine.processes > 1:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
                  str(machine.processes), "-m", "lmms_eval"]  # fmt: skip
    limit = [] if machine.limit is None else ["--limit", str(machine.limit)]
    return [
        *launch, "--model", "vlmcompress", "--model_args", ",".join(f"{k}={v}" for k, v in arguments.items()),
        "--tasks", ",".join(PINNED + task for task in tasks), "--include_path", str(out / "tasks"),
        "--batch_size", str(machine.batch_size), "--device", machine.device, "--output_path", str(row / "lmms"), *limit,
    ]  # fmt: skip


def run_row(folder: Path, asked: Sequence[str]) -> Scores:
    """The scores of one row, from ``folder/run.json`` where it is finished, else by running ``asked``.

    Raises ``ValueError`` when the folder holds another run, and when lmms-eval fails; its output is in ``log.txt``.
    """
    stored = folder / "run.json"
    if stored.is_file():
        before = read_json(stored)
        if before["command"] != list(asked):
            raise ValueError(f"{folder} holds a run of another configuration; take another folder or delete this one.")
        return before["scores"]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run(asked, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    files = sorted((folder / "lmms").rglob("*_results.json"), key=lambda file: file.stat().st_mtime)
    if done.returncode or not files:
        raise ValueError(
            f"lmms-eval failed ({_last_error((folder / 'log.txt').read_text())}); see {folder / 'log.txt'}."
        )
    found = scores(read_json(files[-1])["results"])
    write_json(stored, {"command": list(asked), "environment": environment(), "scores": found})
    return found


def _last_error(log: str) -> str:
    """What a log says last that names an error, or its last line; colours of the terminal left out."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (named or lines or ["it said nothing"])[-1][:300]


def scores(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Values and standard errors by task and metric, from the results file of lmms-eval."""
    table: dict[str, dict[str, tuple[float, float | None]]] = {}
    for task, metrics in results.items():
        row = table.setdefault(task.removeprefix(PINNED), {})
        for key, value in metrics.items():
            name, _, ending = key.partition(",")
            if ending and not name.endswith("_stderr") and isinstance(value, (int, float)):
                error = metrics.get(f"{name}_stderr,{ending}")
                row[name] = (float(value), float(error) if isinstance(error, (int, float)) else None)
    return table


# the verdicts ---------------------------------------------------------------------------------------------------------
def combined(benchmark: Benchmark, found: Scores) -> tuple[float, float | None]:
    """A benchmark's value and standard error on the published scale; ``ValueError`` for a metric that did not come."""
    try:
        pairs = [found[task][metric] for task, metric in benchmark.parts]
    except KeyError as error:
        raise ValueError(f"lmms-eval reported no {error}.") from error
    share = benchmark.scale / (len(pairs) if benchmark.combine == "mean" else 1)
    value = share * sum(value for value, _ in pairs)
    errors = [e for _, e in pairs if e is not None]
    return value, share * math.hypot(*errors) if len(errors) == len(pairs) else None


def judge(table: Table, found: Mapping[tuple[str, str], Scores | str], limit: int | None) -> list[dict[str, Any]]:
    """One entry per published cell: theirs, ours, the difference, what it may be, a verdict.

    ``found``: the scores of each row (method, tokens), or why there are none. On a ``limit`` of questions the standard
    error of ours comes on top of the tolerance; where there is none, no verdict is given.
    """
    entries = [_entry(table, cell, found.get(cell.row, ""), limit) for cell in table.cells]
    for entry, cell in zip(entries, table.cells, strict=True):
        if cell.averages and not entry["reason"]:
            _average(table, cell, entry, entries, limit)
    return entries


def _entry(table: Table, cell: Cell, scores: Scores | str, limit: int | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "benchmark": cell.benchmark, "metric": cell.metric, "method": cell.method, "tokens": cell.tokens,
        "source": cell.source, "theirs": cell.value, "ours": None, "difference": None, "allowed": None, "verdict": "",
        "reason": table.why_not(cell),
    }  # fmt: skip
    if entry["reason"]:
        return entry | {"verdict": "not run"}
    if isinstance(scores, str):
        return entry | {"verdict": "failed", "reason": scores}
    if cell.averages:
        return entry
    benchmark = table.protocol.benchmarks[f"{cell.benchmark}/{cell.metric}"]
    entry |= {"prompt": benchmark.prompt, "tasks": benchmark.parts, "note": benchmark.note}
    try:
        ours, error = combined(benchmark, scores)
    except ValueError as failure:
        return entry | {"verdict": "failed", "reason": str(failure)}
    sampling = _sampling_error(benchmark, cell.value, error, limit)
    return entry | _verdict(ours, cell.value, None if sampling is None else benchmark.tolerance + 1.96 * sampling)


def _sampling_error(benchmark: Benchmark, theirs: float, ours: float | None, limit: int | None) -> float | None:
    """Standard error of a subset's value, or None where it is not known; 0 with all questions, which are the same ones.

    A handful of right answers has a standard error of zero, so that of the published share counts where it is larger.
    """
    if limit is None:
        return 0.0
    share = theirs / benchmark.scale
    if benchmark.combine == "mean" and benchmark.scale > 1 and 0 <= share <= 1:
        published = benchmark.scale * math.sqrt(share * (1 - share) / (limit * len(benchmark.parts)))
        return max(published, ours or 0.0)
    return ours


def _verdict(ours: float, theirs: float, allowed: float | None) -> dict[str, Any]:
    difference = ours - theirs
    verdict = (
        "met" if allowed is not None and abs(difference) <= allowed + 1e-9 else "above" if difference > 0 else "below"
    )
    return {
        "ours": ours, "difference": difference, "allowed": allowed,
        "verdict": "not judged" if allowed is None else verdict,
    }  # fmt: skip


def _average(
    table: Table, cell: Cell, entry: dict[str, Any], entries: Sequence[dict[str, Any]], limit: int | None
) -> None:
    """Both sides over the same columns: those that were run. The printed average may have more of them."""
    single = [e for e, c in zip(entries, table.cells, strict=True) if not c.averages and e["ours"] is not None]
    rows = {e["benchmark"]: e for e in single if (e["method"], e["tokens"], e["source"]) == (*cell.row, cell.source)}
    whole = {e["benchmark"]: e for e in single if e["method"] == "none"}
    names = sorted(set(rows) & set(whole)) if cell.metric == RATIOS else sorted(rows)
    if cell.metric == RATIOS:
        names = [n for n in names if whole[n]["ours"] and whole[n]["theirs"]]
    if not names:
        entry.update(verdict="not run", reason="none of its columns was run")
        return

    def mean(side: str) -> float:
        ratios = cell.metric == RATIOS
        return statistics.fmean(100 * rows[n][side] / whole[n][side] if ratios else rows[n][side] for n in names)

    # a mean over a few questions per task has no standard error here
    allowed = None if limit else table.protocol.average_tolerance
    theirs = mean("theirs")
    entry.update(_verdict(mean("ours"), theirs, allowed), theirs=theirs, printed=cell.value, columns=names)


def slug(row: tuple[str, str]) -> str:
    """Folder of a row."""
    return "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in part) for part in row)


def as_report(table: Table, entries: Sequence[dict[str, Any]], checkpoint: str, machine: Machine) -> dict[str, Any]:
    """What ``reproduction.json`` holds."""
    return {
        "schema": SCHEMA, "table": table.name, "checkpoint": checkpoint, "protocol": table.pins.protocol,
        "about": table.protocol.about, "model_args": table.protocol.model_args, "limit": machine.limit,
        "environment": environment(), "cells": list(entries),
    }  # fmt: skip
