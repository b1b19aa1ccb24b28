# SPDX-License-Identifier: Apache-2.0
"""A stock model without its language model: the tower and the projector, in the classes of transformers."""

from __future__ import annotations

import copy
from math import prod

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .. import flex
from ..adapters.base import adapter_for

#: numbers in a configuration that the geometry of a tower and its projector does not depend on, and the twin's
_SMALL = {
    "hidden_size": 8, "embed_dim": 8, "out_hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1,
    "num_key_value_heads": 1, "num_heads": 1, "head_dim": 8, "mlp_ratio": 1, "projection_dim": 8,
}  # fmt: skip


def shell_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` whose language model has no layer and a vocabulary of one.

    A flexible projector makes a token of every patch there: how many are fed is the method's choice, not a prompt's.
    """
    shell = copy.deepcopy(config)
    text = shell.get_text_config()
    for name, value in {"num_hidden_layers": 0, "layer_types": [], "vocab_size": 1, "pad_token_id": None}.items():
        if hasattr(text, name):
            setattr(text, name, value)
    for name in ("vlmcompress", "quantization_config"):
        if hasattr(shell, name):
            delattr(shell, name)
    if getattr(shell, "tokenflex", None):
        shell.tokenflex = {**shell.tokenflex, "num_image_tokens": prod(flex.patch_grid(shell.vision_config))}
    return shell


def vision_half(config: PreTrainedConfig) -> PreTrainedModel:
    """The stock model of ``config`` with fresh weights, its language model an empty shell, on the default device.

    In the default dtype. Projectors of ours that the configuration speaks of are put in.
    """
    shell = shell_config(config)
    projector = getattr(shell, "tokenflex", None)
    model = AutoModelForImageTextToText.from_config(shell, dtype=torch.get_default_dtype())
    if projector:
        flex.install(model, **projector)
    return deepened(model, config)


def deepened(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """``model``, a shell, with as many empty decoder layers as ``config`` has: methods ask how deep a model is."""
    depth = config.get_text_config().num_hidden_layers
    model.model.language_model.layers = nn.ModuleList([nn.Identity() for _ in range(depth)])
    return model.eval().requires_grad_(False)


def twin(config: PreTrainedConfig) -> PreTrainedModel:
    """The :func:`vision_half` of a model of the same geometry that is eight channels wide, on the CPU in fp32.

    Its vision layers only project queries, keys and values and hand their input on: what a method counts by is there,
    and the cost of attention is not.
    """
    small = copy.deepcopy(config)
    for part in (small.vision_config, small.get_text_config()):
        for name, value in _SMALL.items():
            if isinstance(getattr(part, name, None), (int, float)):
                setattr(part, name, value)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # the caller's random numbers stay as they are
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            model = vision_half(small)
    finally:
        torch.set_default_dtype(before)
    adapter = adapter_for(model)
    for index, layer in enumerate(adapter.tower_layers):
        layer.forward = _projecting(list(adapter.tower_projections(index).values()))
    return model


def _projecting(projections: list[nn.Module]):
    def forward(hidden_states: Tensor, *args, **kwargs) -> Tensor:
        for linear in projections:
            linear(hidden_states)
        return hidden_states

    return forward
