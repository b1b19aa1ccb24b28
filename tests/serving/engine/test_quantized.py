# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: a quantised language model is vLLM's affair, a quantised tower is refused in one sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving.engine.asking import answers, by_engine, by_transformers, questions
from serving.engine.conftest import TINY
from serving.engine.widened import widen

import vlmcompress

ENTRY = {"method": "vtc-cls", "keep": 16}
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}


def quantize(folder: Path, part: str, rest: list[str]) -> Path:
    """The linear layers of ``part`` as compressed-tensors keeps them: int8 with one scale per row; ``rest`` is not."""
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith(part) and re.search(r"(_proj|fc\d)\.weight$", name):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            weights[name.replace(".weight", ".weight_scale")] = scale
            tensor = (tensor / scale).round().to(torch.int8)
        weights[name] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": rest,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
                "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_quantised_tower_is_refused(start, tmp_path):
    folder = quantize(
        widen(TINY, tmp_path / "wide"), "vision_tower", ["re:.*language_model.*", "re:.*projector.*", "lm_head"]
    )
    with pytest.raises(ValueError, match=r"is of torch.int8; .* needs it unquantised") as told:
        start(folder, ENTRY)
    assert "\n" not in str(told.value)


def test_a_quantised_language_model_is_served(start, tmp_path, model, processor):
    folder = quantize(
        widen(TINY, tmp_path / "wide"), "language_model", ["re:.*vision_tower.*", "re:.*projector.*", "lm_head"]
    )
    requests = questions(processor, 40)
    found = answers(by_engine(start(folder, ENTRY), requests))
    with vlmcompress.compress(model, positions="contiguous", **ENTRY):
        expected = by_transformers(model, processor, requests)
    # eight bits change an answer now and then
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 36
