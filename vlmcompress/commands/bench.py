# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench``: the speed ratios, with machine and versions, as a file under ``results/``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

METHOD, KEEPS = "vtc-cls", (192, 128, 64)
#: what each ratio should stay under
TARGETS = {"overhead": 1.05, "method_over_tower": 0.01, "attach_ms": 50, "remove_ms": 50, "import_seconds": 0.3}


def bench(out: Path, rounds: int, device: str) -> dict[str, Any]:
    """Measure, print, and write ``out/bench-DEVICE-torchVERSION.json``."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from ..eval import limit, results
    from ..eval.store import write_json

    path = result_path(out, "bench", device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    config = limit.cpu_shape()
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("prefills", total=(rounds + 1) * (1 + 2 * len(KEEPS)))
        model = LlavaForConditionalGeneration(config).to(device, dtype).eval()
        inputs = limit.prompt(config, device, dtype)
        speed = limit.measure(model, inputs, METHOD, KEEPS, rounds, lambda: progress.advance(bar))
    report = {
        "schema": "vlmcompress.bench/1",
        "command": f"vlmcompress bench --rounds {rounds} --device {device}",
        "environment": results.environment(device),
        "shape": limit.CPU_SHAPE,
        "dtype": str(dtype),
        "method": METHOD,
        "rounds": rounds,
        "targets": TARGETS,
        "speed": speed,
        "largest_new_tensor": limit.largest_new_tensor(model, inputs, METHOD, KEEPS[0]),
        "attach_remove_ms": limit.attach_remove_ms(model, METHOD, KEEPS[0]),
        "import_seconds": limit.import_seconds(),
    }
    write_json(path, report)
    console.print(_table(report))
    console.print(f"Written: {path}", highlight=False)
    return report


def result_path(out: Path, kind: str, device: str) -> Path:
    """``out/KIND-DEVICE-torchVERSION.json``, its folder made. Raises ``ValueError`` when ``out`` is a file."""
    import torch

    from ..eval.results import environment

    if out.exists() and not out.is_dir():
        raise ValueError(f"The results cannot go to {out}: it is a file, not a folder.")
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", environment(device)["device"].lower()).strip("-")
    return out / f"{kind}-{name}-torch{torch.__version__.split('+')[0]}.json"


def _table(report: dict[str, Any]) -> Table:
    speed = report["speed"]
    table = Table(box=box.SIMPLE_HEAD, title=report["shape"], title_justify="left")
    for column in ("keep", "after the tower, ms", "native prompt, ms", "overhead", "speed-up", "method / tower"):
        table.add_column(column, justify="right")
    table.add_row(
        "all", f"{speed['after_tower_ms']['median']:.1f}", "", "", "", f"(tower {speed['tower_ms']['median']:.1f} ms)"
    )
    for keep, found in speed["keep"].items():
        table.add_row(
            keep,
            f"{found['compressed_ms']['median']:.1f}",
            f"{found['native_ms']['median']:.1f}",
            f"{found['overhead']:.3f}",
            f"{found['speedup_after_tower']:.2f}×",
            f"{found['method_over_tower']:.2%}",
        )
    attach, seconds, new = report["attach_remove_ms"], report["import_seconds"], report["largest_new_tensor"]
    lines = [
        f"attach {attach['attach']:.1f} ms, remove {attach['remove']:.1f} ms",
        f"import {seconds['over_transformers']:.2f} s over transformers, {seconds['over_a_model_class']:.2f} s over a "
        "model class",
        f"largest new tensor {new['shape']}: {new['numbers'] / new['heads_n_n']:.1%} of heads × N × N",
    ]
    table.caption = "; ".join(lines)
    return table
