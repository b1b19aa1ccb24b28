# SPDX-License-Identifier: Apache-2.0
"""Peak memory of one prefill with thousands of visual tokens, each time in a process of its own.

A method that formed a heads × N × N tensor in the language model would show it here: at N of this size that tensor is
larger than everything else which a prefill allocates.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

#: patches along a side of the picture: 4,096 visual tokens
SIDE = 64
TOWER_LAYERS, TEXT_LAYERS, WIDTH = 2, 4, 2048


def shape(side: int, width: int) -> Any:
    """:func:`~vlmcompress.eval.limit.cpu_shape` with ``side``² visual tokens, fewer layers and a Llama of ``width``."""
    from .limit import cpu_shape

    config = cpu_shape()
    config.vision_config.image_size = side * config.vision_config.patch_size
    config.vision_config.num_hidden_layers = TOWER_LAYERS
    text = config.text_config
    text.num_hidden_layers, text.hidden_size = TEXT_LAYERS, width
    text.intermediate_size, text.head_dim = width * 43 // 16, width // text.num_attention_heads
    return config


def peak(method: str, options: Mapping[str, Any], side: int, width: int) -> dict[str, float]:
    """Of this process: bytes resident at most, and bytes of tensors that one prefill holds at most above the weights.

    ``method`` "none" is the stock model without hooks. Counts what has happened so far, so call it once per process.
    """
    import resource

    import torch
    from transformers import LlavaForConditionalGeneration

    from ..method import create
    from .latency import peak_bytes
    from .limit import prompt
    from .speed import attached, prefill

    torch.manual_seed(0)
    config = shape(side, width)
    model = LlavaForConditionalGeneration(config).eval()
    inputs = prompt(config, "cpu", torch.float32)
    chosen = None if method == "none" else create(method, **options).methods[0]
    with torch.inference_mode(), attached(model, chosen) as handle:
        held = peak_bytes(lambda: prefill(model, inputs))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tokens = [side**2] * TEXT_LAYERS if handle is None else list(handle.report().layer_tokens)
    return {"resident": resident, "tensors": held, "layer_average": statistics.mean(tokens)}


def measure(
    cases: Mapping[str, Mapping[str, Any]], repeats: int, tick: Callable[[], None], side: int = SIDE, width: int = WIDTH
) -> dict[str, Any]:
    """:func:`peak` of every method (name → options), the stock model in front, processes alternating; medians."""
    from .limit import TEXT_TOKENS

    runs: dict[str, list[dict[str, float]]] = {"none": [], **{name: [] for name in cases}}
    code = "import json, sys; from vlmcompress.eval.memory import peak; print(json.dumps(peak(*json.load(sys.stdin))))"
    for _ in range(repeats):
        for name, found in runs.items():
            asked = json.dumps([name, cases.get(name, {}), side, width])
            done = subprocess.run(
                [sys.executable, "-c", code], input=asked, stdout=subprocess.PIPE, text=True, check=True
            )
            found.append(json.loads(done.stdout.splitlines()[-1]))
            tick()
    table = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    config = shape(side, width).text_config
    sequence = side**2 + TEXT_TOKENS
    stock = table.pop("none")
    for found in table.values():
        found |= {f"{key}_over_uncompressed": found[key] / stock[key] for key in ("resident", "tensors")}
    return {
        "visual_tokens": side**2,
        "text_tokens": TEXT_TOKENS,
        "tower_layers": TOWER_LAYERS,
        "decoder_layers": TEXT_LAYERS,
        "heads_n_n_bytes": config.num_attention_heads * sequence**2 * 4,
        "uncompressed": stock,
        "methods": table,
    }
