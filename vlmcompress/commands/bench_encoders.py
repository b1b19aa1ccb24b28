# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench encoders``: CenterCLIP at the size of ViT-B/16, and pruned towers on single images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .bench import result_path

if TYPE_CHECKING:
    from ..eval.encoders import Shape

#: what must hold on any machine
TARGETS = {"clustering_speedup": 10.0, "clustered_tower_speedup": 1.0}


def bench_encoders(out: Path, rounds: int, device: str, shape: Shape | None = None) -> dict[str, Any]:
    """Measure ``shape`` (default: ViT-B/16), print, and write ``out/bench-encoders-DEVICE-torchVERSION.json``."""
    import torch

    from ..eval import encoders, results
    from ..eval.store import write_json

    path = result_path(out, "bench-encoders", device)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    torch.manual_seed(0)
    shape = shape or encoders.Shape()
    videos, images = encoders.video_methods(shape), encoders.image_methods(shape)
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("runs", total=(rounds + 2) * 2 + (rounds + 1) * (len(videos) + len(images)))

        def tick() -> None:
            progress.advance(bar)

        def tower(build, count: int, methods) -> dict[str, Any]:
            pixels = torch.randn(count, 3, shape.side, shape.side).to(device, dtype)
            return encoders.towers(build().to(device, dtype).eval(), pixels, methods, rounds, device, tick)

        found = {
            "clustering": encoders.clustering(shape, rounds, device, tick),
            "video": tower(shape.video_tower, shape.frames, videos),
            "images": tower(shape.image_tower, shape.images, images),
        }
    report = {
        "schema": "vlmcompress.bench-encoders/1",
        "command": f"vlmcompress bench encoders --rounds {rounds} --threads {torch.get_num_threads()} --device {device}",
        "environment": results.environment(device),
        "shape": str(shape),
        "dtype": str(dtype),
        "rounds": rounds,
        "targets": TARGETS,
        **found,
    }
    write_json(path, report)
    console.print(_clusters(report["clustering"]))
    for part in ("video", "images"):
        console.print(_table(part, report[part]))
    console.print(f"Written: {path}", highlight=False)
    return report


def _clusters(found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="clustering of one video", title_justify="left")
    for column in ("", "ms", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name, timing in found["ms"].items():
        table.add_row(name, f"{timing['median']:.1f}", f"{found['peak_bytes'][name] / 1e6:.0f}")
    table.caption = f"{found['speedup']:.1f} times faster; {found['same_medoids']:.1%} of the centres are the same"
    return table


def _table(title: str, found: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("", "ms", "speed-up", "FLOPs of the layers"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in found.items():
        table.add_row(name, f"{row['ms']['median']:.0f}", f"{row['speedup']:.2f}×", f"{row['flops_share']:.0%}")
    return table
