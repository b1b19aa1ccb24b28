# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench stages``: tower, projector, method, prefill, decoding and the whole, with memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .bench import result_path

NEW_TOKENS = 8
#: one method of each stage, at a ninth of 576 visual tokens; the cache policy at a fifth of the cache
METHODS: dict[str, dict[str, Any]] = {
    "vtc-cls": {"keep": 64},
    "flowcut": {"keep": 64},
    "fastv": {"keep": 64},
    "h2o": {"heavy": 0.1, "recent": 0.1},
}


def bench_stages(out: Path, rounds: int, device: str) -> dict[str, Any]:
    """Measure, print, and write ``out/bench-stages-DEVICE-torchVERSION.json``."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from ..eval import limit, results, stages
    from ..eval.store import write_json
    from ..method import create

    path = result_path(out, "bench-stages", device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    config = limit.cpu_shape()
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("runs", total=(rounds + 1) * (1 + len(METHODS)))
        model = LlavaForConditionalGeneration(config).to(device, dtype).eval()
        found = stages.measure(
            model, limit.prompt(config, device, dtype),
            {name: create(name, **options).methods[0] for name, options in METHODS.items()},
            rounds=rounds, new_tokens=NEW_TOKENS, tick=lambda: progress.advance(bar),
        )  # fmt: skip
    report = {
        "schema": "vlmcompress.bench-stages/1",
        "command": f"vlmcompress bench stages --rounds {rounds} --threads {torch.get_num_threads()} --device {device}",
        "environment": results.environment(device),
        "shape": limit.CPU_SHAPE,
        "dtype": str(dtype),
        "rounds": rounds,
        "new_tokens": NEW_TOKENS,
        "cases": found,
    }
    write_json(path, report)
    console.print(stage_table(report["shape"], found))
    console.print(f"Written: {path}", highlight=False)
    return report


def stage_table(title: str, cases: dict[str, Any]) -> Table:
    """Medians per case, for the terminal."""
    from ..eval.stages import PARTS

    table = Table(box=box.SIMPLE_HEAD, title=f"{title}; milliseconds", title_justify="left")
    names = ("case", *(part.replace("_", " ") for part in PARTS), "speed-up", "peak, MiB", "cache, MiB")
    for name in names:
        table.add_column(name, justify="left" if name == "case" else "right")
    for name, case in cases.items():
        clocks = [f"{case['ms'][part]['median']:.2f}" for part in PARTS]
        sizes = [f"{case[key] / 2**20:.1f}" for key in ("peak_bytes", "cache_bytes")]
        table.add_row(name, *clocks, f"{case['speedup']['end_to_end']:.2f}×", *sizes)
    return table
