# SPDX-License-Identifier: Apache-2.0
"""From stored answers to ``report.json``: one entry per row, every number with its interval.

``pandas.json_normalize(json.load(open("report.json"))["rows"])`` reads the file.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import stats
from .rows import UNCOMPRESSED, Row
from .store import Store, read_json

SCHEMA = "vlmcompress.report/1"
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


def summarize(
    store: Store,
    rows: Sequence[Row],
    tasks: Sequence[str],
    *,
    errors: dict[str, str],
    timings: dict[str, dict[str, Any]],
    expected: int,
) -> list[dict[str, Any]]:
    """One dict per row, the uncompressed one first; a row whose run failed carries ``error`` instead of numbers."""
    reference = _by_id(store.answers(UNCOMPRESSED)) if UNCOMPRESSED not in errors else {}
    table = []
    for row in rows:
        entry: dict[str, Any] = {"method": row.method, "keep": row.keep, "options": row.options, "key": row.key}
        entry["seeds"] = [s for s in row.seeds if s is not None]
        runs = [_by_id(store.answers(row.run_key(seed))) for seed in row.seeds]
        failed = [errors[key] for key in map(row.run_key, row.seeds) if key in errors]
        if not failed and any(len(run) < expected for run in runs):
            failed = ["not finished"]
        entry["error"] = failed[0] if failed else errors.get(row.key)
        if not failed:
            everything = [line for run in runs for line in run.values()]
            entry |= {name: float(np.mean([line[name] for line in everything])) for name in PER_SAMPLE}
            entry["timing"] = timings.get(row.key)
            entry["tasks"] = {task: _task(task, runs, reference) for task in tasks}
        table.append(entry)
    return table


def _by_id(answers: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(a["task"], a["id"]): a for a in answers}


def _task(task: str, runs: list[dict], reference: dict) -> dict[str, Any]:
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
    }
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
    return report
