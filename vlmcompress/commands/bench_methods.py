# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench methods``: every method's whole prefill against its FLOPs, the cost of its parts, peak memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..method import Method
from .bench import result_path

#: what the ratios should reach (at least) or stay under (at most)
TARGETS = {
    "of_predicted": 0.9,
    "of_predicted_between_decoder_layers": 0.85,
    "cut_of_prefill": 0.02,
    "globalcom2_entry_ms": 10,
    "flowcut_tower_without_cuts": 1.05,
    "flowcut_tower_with_cuts": 1.0,
}
NINTH = 1 / 9
#: name → options at a ninth of 576 visual tokens
BEFORE: dict[str, dict[str, Any]] = {
    "random": {"keep": 64},
    "pool": {"keep": 64},
    "vtc-cls": {"keep": 64},
    "flowcut": {"keep": 64},
}
#: a ninth is what the last layers see; the first ones see everything, so their average lies above
INSIDE: dict[str, dict[str, Any]] = {
    "transprune": {"layers": (1, 2, 3), "fractions": (0.5, 0.25, NINTH)},
    "mustdrop": {"keep": 0.25},
    "fastv": {"keep": 64},
}
TILED: dict[str, dict[str, Any]] = {"globalcom2": {"keep": NINTH}}
#: of four decoder layers the first ones weigh more
LONG: dict[str, dict[str, Any]] = INSIDE | {"mustdrop": {"keep": 0.4}}
#: cuts on the way through a tower need attention that is more concentrated than that of random weights
CONCENTRATION = 12.0


def bench_methods(out: Path, rounds: int, device: str) -> dict[str, Any]:
    """Measure, print, and write ``out/bench-methods-DEVICE-torchVERSION.json``."""
    import torch

    from ..eval import memory, results
    from ..eval.store import write_json

    path = result_path(out, "bench-methods", device)
    console = Console()
    few = max(3, rounds // 3)
    steps = (rounds + 1) * (1 + len(BEFORE) + len(INSIDE)) + (few + 1) * (1 + len(INSIDE)) + (rounds + 1) * 3
    steps += (few + 1) * (1 + len(TILED)) + 1 + len(LONG)
    with Progress(console=console) as progress:
        bar = progress.add_task("prefills", total=steps)

        def tick() -> None:
            progress.advance(bar)

        plain = _plain(device, rounds, few, tick)
        tiled = _tiled(device, few, tick)
        held = memory.measure(LONG, 1, tick)
    report = {
        "schema": "vlmcompress.bench-methods/1",
        "command": f"vlmcompress bench methods --rounds {rounds} --threads {torch.get_num_threads()} --device {device}",
        "environment": results.environment(device),
        "shape": "CLIP-L/14-336, Llama 8 layers × 2048, 60 text tokens, random weights; one image of 576 tokens, or of "
        "2 × 2 crops and a thumbnail",
        "dtype": str(_dtype(device)),
        "clock": "processor time" if device == "cpu" and torch.get_num_threads() == 1 else "time of day",
        "rounds": rounds,
        "targets": TARGETS,
        "one_view": plain,
        "tiled": tiled,
        "memory": held,
    }
    write_json(path, report)
    for table in tables(report):
        console.print(table)
    console.print(f"Written: {path}", highlight=False)
    return report


def _dtype(device: str) -> Any:
    import torch

    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def _methods(chosen: dict[str, dict[str, Any]]) -> dict[str, Method]:
    from ..method import create

    return {name: create(name, **options).methods[0] for name, options in chosen.items()}


def _plain(device: str, rounds: int, few: int, tick: Any) -> dict[str, Any]:
    """LLaVA: whole prefills, cuts between decoder layers, FlowCut's tower."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from ..adapters.base import adapter_for
    from ..eval import limit, speed
    from ..methods.flowcut import FlowCut

    torch.manual_seed(0)
    config = limit.cpu_shape()
    model = LlavaForConditionalGeneration(config).to(device, _dtype(device)).eval()
    inputs = limit.prompt(config, device, _dtype(device))
    found = speed.compare(model, inputs, _methods(BEFORE | INSIDE), rounds, tick)
    found["cuts"] = speed.cut_cost(model, inputs, _methods(INSIDE), few, tick)
    for layer in adapter_for(model).tower_layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.data *= CONCENTRATION
    last = config.vision_config.num_hidden_layers - 3
    scoring = FlowCut(keep=575, first_prune_layer=last)  # scores every layer and drops one patch behind the last
    found["flowcut_tower"] = speed.tower_cost(
        model, inputs["pixel_values"], {"without cuts": scoring, "with cuts": FlowCut(keep=64)}, rounds, tick
    )
    return found


def _tiled(device: str, rounds: int, tick: Any) -> dict[str, Any]:
    """LLaVA-NeXT with an image of 2 × 2 crops: whole prefills, and what GlobalCom² itself takes."""
    import torch
    from transformers import LlavaNextForConditionalGeneration

    from ..eval import speed

    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(speed.tiled_shape()).to(device, _dtype(device)).eval()
    inputs = speed.tiled_prompt(model, device, _dtype(device))
    return speed.compare(model, inputs, _methods(TILED), rounds, tick)


def tables(report: dict[str, Any]) -> list[Table]:
    """What was measured, for the terminal."""
    whole = Table(box=box.SIMPLE_HEAD, title=report["shape"], title_justify="left")
    for column in ("method", "tokens in", "average", "prefill, ms", "speed-up", "FLOPs say", "share of that"):
        whole.add_column(column, justify="left" if column == "method" else "right")
    for part in ("one_view", "tiled"):
        whole.add_row("uncompressed", "", "", f"{report[part]['uncompressed']['prefill_ms']['median']:.0f}", "", "", "")
        for name, row in report[part]["methods"].items():
            whole.add_row(
                name, str(row["tokens_in"]), f"{row['layer_average']:.0f}", f"{row['prefill_ms']['median']:.0f}",
                f"{row['speedup']:.2f}×", f"{row['predicted']:.2f}×", f"{row['of_predicted']:.2f}",
            )  # fmt: skip
        whole.add_section()
    parts = Table(box=box.SIMPLE_HEAD)
    for column in ("part", "measured"):
        parts.add_column(column, justify="left" if column == "part" else "right")
    for name, row in report["one_view"]["cuts"].items():
        parts.add_row(f"one cut of {name}", f"{row['ms_per_cut']:.1f} ms, {row['of_prefill']:.2%} of the prefill")
    for name, row in report["one_view"]["flowcut_tower"].items():
        if "over_stock" in row:
            parts.add_row(f"tower with flowcut, {name}", f"{row['over_stock']:.3f} of the stock tower")
    for stage, spent in report["tiled"]["methods"]["globalcom2"]["own_ms"].items():
        parts.add_row(f"globalcom2, {stage}", f"{spent:.1f} ms")
    memory = report["memory"]
    for name, row in memory["methods"].items():
        parts.add_row(
            f"{name}, {memory['visual_tokens']} visual tokens",
            f"{row['resident_over_uncompressed']:.3f} of the uncompressed peak memory",
        )
    return [whole, parts]
