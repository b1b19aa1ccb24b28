# SPDX-License-Identifier: Apache-2.0
"""From stored answers to ``report.json`` (its fields: :mod:`.schema`): one entry per row, numbers with intervals."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import compare, stats
from .compare import Scored
from .rows import UNCOMPRESSED, Row
from .schema import REPORT as SCHEMA
from .schema import Report, check
from .store import Store, read_json

PER_SAMPLE = ("tokens_in", "layer_tokens", "macs", "flops", "full", "compressor_flops", "kv_bytes")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions and machine, as every result file carries them."""
    import torch
    import transformers

    import vlmcompress

    return {
        "vlmcompress": vlmcompress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.is_file() else []  # fmt: skip
    return names[0] if names else platform.processor() or "unknown"


Totals = Callable[[list[dict[str, Any]]], dict[str, float]]


def summarize(
    store: Store,
    rows: Sequence[Row],
    tasks: Sequence[str],
    *,
    errors: dict[str, str],
    timings: dict[str, dict[str, Any]],
    expected: int,
    totals: Mapping[str, Totals] | None = None,
    unclocked: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """One dict per row, the uncompressed one first; a row whose run failed carries ``error`` instead of numbers.

    ``totals`` are metrics over all answers to a task, by task (:meth:`.tasks.Sample.aggregate`). ``unclocked``: errors of
    rows whose clock failed, by row key; they keep their answers' numbers.
    """
    reference = _by_id(store.answers(UNCOMPRESSED)) if UNCOMPRESSED not in errors else {}
    table = []
    for row in rows:
        entry: dict[str, Any] = {"method": row.method, "keep": row.keep, "options": row.options, "key": row.key}
        entry["seeds"] = [s for s in row.seeds if s is not None]
        runs = [_by_id(store.answers(row.run_key(seed))) for seed in row.seeds]
        failed = [errors[key] for key in map(row.run_key, row.seeds) if key in errors]
        if not failed and any(len(run) < expected for run in runs):
            failed = ["not finished"]
        entry["error"] = failed[0] if failed else (unclocked or {}).get(row.key)
        if not failed:
            everything = [line for run in runs for line in run.values()]
            entry |= {name: float(np.mean([line[name] for line in everything])) for name in PER_SAMPLE}
            entry["timing"] = timings.get(row.key)
            entry["tasks"] = {task: _task(task, runs, reference, (totals or {}).get(task)) for task in tasks}
        table.append(entry)
    return table


def add_comparisons(store: Store, rows: Sequence[Row], table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the hard subset and the comparisons at equal cost into the entries; return the ties (:mod:`.compare`)."""
    found: list[dict[str, Any]] = []
    finished = [(row, entry) for row, entry in zip(rows, table, strict=True) if "tasks" in entry]
    answers = {row.key: [_by_id(store.answers(row.run_key(seed))) for seed in row.seeds] for row, _ in finished}
    for task in finished[0][1]["tasks"] if finished else ():
        keys = sorted(key for key in answers[finished[0][0].key][0] if key[0] == task)
        groups = [answers[finished[0][0].key][0][key]["image"] for key in keys]
        difference = stats.Differences(groups)
        scored = [
            Scored(
                row.key, row.method, row.keep,
                np.mean([[run[key]["correct"] for key in keys] for run in answers[row.key]], axis=0),
                {cost: entry[cost] for cost in compare.COSTS},
            )
            for row, entry in finished
        ]  # fmt: skip
        resized = {mine.keep: mine for mine in scored if mine.method == "resize"}
        whole = next((mine for mine in scored if mine.method == UNCOMPRESSED), None)
        for (_, entry), mine in zip(finished, scored, strict=True):
            if mine.keep is None:
                continue
            if mine.keep in resized:
                entry["tasks"][task]["hard"] = compare.hard_subset(mine, resized[mine.keep], whole, groups)
            entry["tasks"][task]["equal"] = compare.equal_cost(mine, scored, difference)
        found += compare.ties(task, scored, difference)
    return found


def _by_id(answers: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(a["task"], a["id"]): a for a in answers}


def _task(task: str, runs: list[dict], reference: dict, totals: Totals | None) -> dict[str, Any]:
    """Accuracy of one row on one task: mean over its seeds, spread over them, and what is left of the uncompressed."""
    keys = [key for key in runs[0] if key[0] == task]
    groups = [runs[0][key]["image"] for key in keys]
    per_seed = [[float(run[key]["correct"]) for key in keys] for run in runs]
    correct = np.mean(per_seed, axis=0)
    interval = stats.accuracy(correct, groups)
    mean, sd = stats.mean_sd([float(np.mean(c)) for c in per_seed])
    kinds: dict[str, list[float]] = {}
    for key, value in zip(keys, correct, strict=True):
        kinds.setdefault(runs[0][key]["kind"], []).append(float(value))
    found = {
        "n": len(keys),
        "accuracy": mean,
        "low": interval.low,
        "high": interval.high,
        "sd_over_seeds": sd,
        "by_kind": {kind: float(np.mean(values)) for kind, values in sorted(kinds.items())},
        "retained": None,
        "empty": float(np.mean([not run[key]["prediction"].strip() for run in runs for key in keys])),
    }
    sums = [totals([run[key] for key in keys]) for run in runs] if totals is not None else [{}]
    found["metrics"] = {name: float(np.mean([each[name] for each in sums])) for name in sums[0]}
    if all(key in reference for key in keys):
        kept = stats.retained(correct, [float(reference[key]["correct"]) for key in keys], groups)
        if not np.isnan(kept.value):
            found["retained"] = asdict(kept)
    return found


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a ``report.json``; ``ValueError`` in one sentence when it is damaged or of another schema."""
    report = read_json(Path(path))
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{path} is no {SCHEMA} file.")
    check(Report, report, path)
    return report
