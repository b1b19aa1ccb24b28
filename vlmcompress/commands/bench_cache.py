# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench cache``: decode speed and memory of the cache policies behind a long prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .bench import result_path

TOKENS, LAYERS, WIDTH, STEPS = 4096, 4, 1024, 8
#: a fifth of the cache, where a policy evicts
METHODS: dict[str, dict[str, Any]] = {
    "h2o": {"heavy": 0.1, "recent": 0.1},
    "a2sf": {"budget": 0.2},
    "keyformer": {"budget": 0.2},
    "lazyeviction": {"budget": TOKENS // 5, "window": 4},
    "tokenselect": {"select": TOKENS // 10, "sinks": 4, "local": TOKENS // 10 - 4},
}
TARGETS = {"h2o_decode_speedup": 1.3}


def bench_cache(out: Path, rounds: int, device: str) -> dict[str, Any]:
    """Measure, print, and write ``out/bench-cache-DEVICE-torchVERSION.json``."""
    import torch

    from ..eval import decoding, results
    from ..eval.store import write_json
    from ..method import create

    path = result_path(out, "bench-cache", device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("prompts and rounds", total=(1 + len(METHODS)) * (rounds + 2))
        found = decoding.measure(
            {name: create(name, **options).methods[0] for name, options in METHODS.items()},
            tokens=TOKENS, layers=LAYERS, width=WIDTH, rounds=rounds, steps=STEPS, device=device, dtype=dtype,
            tick=lambda: progress.advance(bar),
        )  # fmt: skip
    report = {
        "schema": "vlmcompress.bench-cache/1",
        "command": f"vlmcompress bench cache --rounds {rounds} --threads {torch.get_num_threads()} --device {device}",
        "environment": results.environment(device),
        "shape": f"Llama {LAYERS} layers × {WIDTH}, prompt of {TOKENS} tokens of which 576 visual, random weights",
        "dtype": str(dtype),
        "rounds": rounds,
        "steps": STEPS,
        "targets": TARGETS,
        "options": METHODS,
        "cases": found,
    }
    write_json(path, report)
    console.print(_table(report))
    console.print(f"Written: {path}", highlight=False)
    return report


def _table(report: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=report["shape"], title_justify="left")
    for column in ("policy", "prefill, ms", "ms per token", "speed-up", "cache, MiB", "of the full", "visual", "text"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, case in report["cases"].items():
        kinds = [f"{case[kind]:.0f}" if case.get(kind) is not None else "" for kind in ("visual", "text")]
        table.add_row(
            name, f"{case['prefill_ms']:.0f}", f"{case['decode_ms_per_token']['median']:.2f}",
            f"{case['decode_speedup']:.2f}×", f"{case['cache_bytes'] / 2**20:.1f}", f"{case['cache_share']:.1%}", *kinds,
        )  # fmt: skip
    return table
