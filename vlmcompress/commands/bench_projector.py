# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench projector``: what TokenFLEX's projector takes of the tower's time, at the released model's sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from .bench import result_path

#: SigLIP-SO400M/14-384 in front of a language model of 3,584 (Qwen2.5-7B)
TOWER: dict[str, int] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384,
    "patch_size": 14,
}  # fmt: skip
TEXT_WIDTH = 3584
COUNTS = (64, 144, 256)
#: share of the tower's time that the projector may take
TARGETS = {"share": 0.02}


def bench_projector(
    out: Path, rounds: int, device: str, tower: dict[str, int] | None = None, text_width: int = TEXT_WIDTH
) -> dict[str, Any]:
    """Measure, print, and write ``out/bench-projector-DEVICE-torchVERSION.json``: one picture, random weights, fp32."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    from ..eval import results
    from ..eval.latency import Timing, interleaved, milliseconds
    from ..eval.store import write_json
    from ..projectors.tokenflex import TokenFlexProjector

    tower = tower or TOWER
    path, side = result_path(out, "bench-projector", device), tower["image_size"]
    grid = side // tower["patch_size"]
    counts = [n for n in COUNTS if n <= grid * grid]
    torch.manual_seed(0)
    vision = SiglipVisionModel(SiglipVisionConfig(**tower)).to(device).eval()
    projector = TokenFlexProjector(tower["hidden_size"], text_width, grid=(grid, grid)).to(device)
    pixels = torch.randn(1, 3, side, side, device=device)
    features = torch.randn(1, grid * grid, tower["hidden_size"], device=device)

    def project(tokens: int) -> Callable[[], float]:
        def run() -> float:
            projector.num_image_tokens = tokens
            return milliseconds(lambda: projector(features), device)

        return run

    cases = {"tower": lambda: milliseconds(lambda: vision(pixels), device)} | {str(n): project(n) for n in counts}
    with torch.inference_mode():
        found = {name: Timing.of(values) for name, values in interleaved(cases, rounds=rounds).items()}
    whole = found["tower"].median
    report = {
        "schema": "vlmcompress.bench-projector/1",
        "command": f"vlmcompress bench projector --rounds {rounds} --threads {torch.get_num_threads()} --device {device}",
        "environment": results.environment(device),
        "shape": {**tower, "text_width": text_width},
        "tower_ms": found["tower"].as_dict(),
        "tokens": {n: {"ms": found[str(n)].as_dict(), "share": found[str(n)].median / whole} for n in counts},
        "targets": TARGETS,
    }
    write_json(path, report)
    console = Console()
    for n in counts:
        console.print(
            f"{n} tokens: {found[str(n)].median:.1f} ms, {found[str(n)].median / whole:.2%} of the tower's {whole:.0f}"
        )
    console.print(f"Written: {path}", highlight=False)
    return report
