# SPDX-License-Identifier: Apache-2.0
"""The small models in a form that vLLM's CPU attention takes: heads of 64 channels, the last 24 of them zero.

Their own heads have 40, which those kernels do not know. Scores, values and rotary angles are the same numbers.
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


def widen_qwen(source: Path, target: Path) -> Path:
    """The same for tiny-qwen2.5-vl. vLLM's class takes a head's width from the model's, so that grows from 160 to 256 too."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    text = config["text_config"]
    heads, hidden = text["num_attention_heads"], text["hidden_size"]
    width, wide = hidden // heads, heads * WIDE
    text["hidden_size"] = config["vision_config"]["out_hidden_size"] = wide
    text["rope_parameters"]["partial_rotary_factor"] = width / WIDE
    text["rms_norm_eps"] *= hidden / wide  # a mean over more channels, the further ones zero
    (target / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".self_attn." in name:
            tensor = _padded(tensor, heads, width, columns="o_proj" in name)
            if "q_proj" in name:
                tensor = tensor * math.sqrt(WIDE / width)
        weights[name] = _grown(tensor, name, hidden, wide).contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _grown(tensor: torch.Tensor, name: str, hidden: int, wide: int) -> torch.Tensor:
    """Zeros in the further channels of what reads from or writes to the residual stream."""
    if "norm" in name and name.startswith("model."):
        tensor = tensor * math.sqrt(hidden / wide)
    writes = "down_proj" in name or "o_proj" in name
    if name.startswith("visual.merger.mlp.2"):
        axis = 0
    elif name.startswith("visual.") or (".self_attn." in name and tensor.ndim == 1):
        return tensor
    else:
        axis = 0 if writes or tensor.ndim == 1 else 1
    return torch.nn.functional.pad(tensor.movedim(axis, -1), (0, wide - hidden)).movedim(-1, axis)


def _padded(weight: torch.Tensor, heads: int, width: int, *, columns: bool) -> torch.Tensor:
    """Zeros behind the ``width`` rows (or columns) of every head."""
    if columns:
        return _padded(weight.T, heads, width, columns=False).T
    split = weight.unflatten(0, (heads, width)).movedim(1, -1)
    return torch.nn.functional.pad(split, (0, WIDE - width)).movedim(-1, 1).flatten(0, 1)
