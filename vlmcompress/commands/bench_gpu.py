# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench gpu``: 7B shapes with random weights by stage, attention kernel and batch, within a time limit."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from .bench import result_path
from .bench_stages import stage_table

BATCHES = (1, 4, 16, 32)
NEW_TOKENS = 8
#: architecture → picture (height, width) and methods, at about a ninth of its visual tokens
SHAPES: dict[str, tuple[tuple[int, int], dict[str, dict[str, Any]]]] = {
    "llava-1.5-7b": ((336, 336), {"vtc-cls": {"keep": 64}, "flowcut": {"keep": 64}, "transprune": {"preset": "high"}}),
    "llava-next-7b": ((672, 672), {"vtc-cls": {"keep": 1 / 9}, "globalcom2": {"keep": 0.1}}),
    "qwen2.5-vl-7b": ((672, 672), {"vtc-cls": {"keep": 1 / 9}, "fastv": {"keep": 64}}),
}
KEEPS = (192, 128, 64)
#: most seconds for the rounds of one cell
CELL_SECONDS = 20.0
TEXT_TOKENS = 60


def bench_gpu(out: Path, rounds: int, device: str, minutes: float = 9.0) -> dict[str, Any]:
    """Measure, print, and write ``out/bench-gpu-DEVICE-torchVERSION.json``, renewed after every cell.

    Cells that memory or time does not allow are in the file with the reason. Raises ``ValueError`` without a GPU.
    """
    import torch

    from ..eval import results
    from ..eval.store import write_json

    if not torch.cuda.is_available():
        raise ValueError("There is no GPU here that torch can use; `vlmcompress bench stages` measures on the CPU.")
    device = device if device.startswith("cuda") else "cuda"
    path, begin = result_path(out, "bench-gpu", device), time.monotonic()
    report: dict[str, Any] = {
        "schema": "vlmcompress.bench-gpu/1",
        "command": f"vlmcompress bench gpu --rounds {rounds} --device {device}",
        "environment": results.environment(device),
        "dtype": "bfloat16",
        "weights": "random",
        "text_tokens": TEXT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "limit": {},
        "cells": [],
    }
    console = Console(width=150)

    def spent() -> bool:
        return time.monotonic() - begin > 60 * minutes

    for cell in cells(report, rounds, device, spent):
        report["cells"].append(cell)
        write_json(path, report)
        title = f"{cell['shape']}, {cell['attention']}, batch {cell['batch']}"
        console.print(f"{title}: {cell['error']}" if "error" in cell else stage_table(title, cell["cases"]))
    console.print(f"Written: {path}", highlight=False)
    return report


def kernels() -> list[str]:
    """Attention kernels that are installed: torch's own, and flash attention where its package is there."""
    return ["sdpa"] + ["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)


def cells(report: dict[str, Any], rounds: int, device: str, spent: Any) -> Iterator[dict[str, Any]]:
    """One result per shape, kernel and batch; the distance to the native short prompt goes into ``report["limit"]``."""
    import torch

    from ..eval import limit, synthetic
    from ..eval.presets import load_config
    from ..method import create

    for name, (size, options) in SHAPES.items():
        model = None
        for kernel in kernels():
            about = {"shape": name, "attention": kernel}
            if spent():
                yield about | {"batch": None, "error": "the time was up"}
                continue
            model = model or random_model(load_config(name), device)
            model.set_attn_implementation(kernel)
            if model.config.model_type == "llava":
                inputs = limit.prompt(model.config, device, torch.bfloat16)
                report["limit"][f"{name} {kernel}"] = limit.measure(
                    model, inputs, "vtc-cls", KEEPS, rounds, lambda: None
                )
            methods = {key: create(key, **value).methods[0] for key, value in options.items()}
            one = synthetic.prompt(model, size, TEXT_TOKENS)
            for batch in BATCHES:
                if spent():
                    yield about | {"batch": batch, "error": "the time was up"}
                    continue
                yield about | {"batch": batch, "image": list(size)} | _cell(model, one, batch, methods, rounds)
        del model
        torch.cuda.empty_cache()


def random_model(config: Any, device: str) -> Any:
    """A model of random weights in bf16, made on the device."""
    import torch
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def _cell(model: Any, one: dict[str, Any], batch: int, methods: dict[str, Any], rounds: int) -> dict[str, Any]:
    """The clocks of one batch size, or that memory does not suffice."""
    import torch

    try:
        cases, fitting = _timed(model, one, batch, methods, rounds)
    except torch.cuda.OutOfMemoryError:
        cases = None
    if cases is None:  # not inside the handler, whose traceback holds on to the tensors
        torch.cuda.empty_cache()
        return {"error": "out of memory"}
    tokens = int((one["input_ids"] == model.config.image_token_id).sum())
    return {"rounds": fitting, "visual_tokens": tokens, "cases": cases}


def _timed(
    model: Any, one: dict[str, Any], batch: int, methods: dict[str, Any], rounds: int
) -> tuple[dict[str, Any], int]:
    """Clocks by case, and the number of rounds that the time for one cell allows, three at least."""
    import torch

    from ..eval import stages, synthetic
    from ..eval.latency import milliseconds

    inputs = synthetic.batch_of(one, batch, model.dtype)

    def once() -> None:
        with torch.inference_mode():
            model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)

    once()
    seconds = milliseconds(once, model.device) / 1e3 * (1 + len(methods))
    fitting = max(3, min(rounds, int(CELL_SECONDS / max(seconds, 1e-3)) - 1))
    return stages.measure(model, inputs, methods, rounds=fitting, new_tokens=NEW_TOKENS), fitting
