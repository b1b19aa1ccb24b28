# SPDX-License-Identifier: Apache-2.0
"""tiny-llava in a form that vLLM's CPU attention takes: heads of 64 channels, the last 24 of them zero.

Its own heads have 40, which those kernels do not know. Scores, values and rotary angles are the same numbers.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WIDE = 64


def widen(source: Path, target: Path, *, hub_names: bool = True) -> Path:
    """Copy the model folder ``source`` to ``target`` with wider heads.

    ``hub_names``: the tower's tensors under the names of the hub's LLaVA checkpoints; else as transformers 5 saves them.
    """
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    heads, width = text["num_attention_heads"], text["head_dim"]
    text["head_dim"] = WIDE
    text["rope_parameters"]["partial_rotary_factor"] = width / WIDE
    (target / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".self_attn." in name and name.startswith("language_model"):
            tensor = _padded(tensor, heads, width, columns="o_proj" in name)
            if "q_proj" in name:
                tensor = tensor * math.sqrt(WIDE / width)  # attention divides by the root of the width
        if hub_names and name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
            name = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
        weights[name] = tensor.contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _padded(weight: torch.Tensor, heads: int, width: int, *, columns: bool) -> torch.Tensor:
    """Zeros behind the ``width`` rows (or columns) of every head."""
    if columns:
        return _padded(weight.T, heads, width, columns=False).T
    split = weight.unflatten(0, (heads, width))
    return torch.nn.functional.pad(split, (0, 0, 0, WIDE - width)).flatten(0, 1)
