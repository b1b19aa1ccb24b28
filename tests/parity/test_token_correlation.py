# SPDX-License-Identifier: Apache-2.0
"""Token-level correlation against the reference numbers, through ``compress`` on stock LLaVA classes.

The vectors give keys, attention and noise, not pixels. The keys are put in where the tower's key projection answers;
attention and noise are handed to the method by the subclass :func:`fed`. All that follows is the library's own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from vectors import cases

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.methods.token_correlation import TokenCorrelation
from vlmcompress.ops.correlation import draw, guarded, merge_dropped, outliers, quartiles, repetition

torch.set_num_threads(1)
IMAGE, LOW, DEEP = 1, 1, 3


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def model_for(width: int, side: int, tiles: tuple[int, int] | None = None):
    """Stock model on views of side × side one-pixel patches; its projector's features leave vision layer ``DEEP``."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=side,
        patch_size=1,
    )
    text = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
        max_position_embeddings=8192,
    )  # fmt: skip
    if tiles is None:
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
        return LlavaForConditionalGeneration(config).eval()
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE,
        image_grid_pinpoints=[[side * tiles[0], side * tiles[1]]],
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config).eval()


def fed(low: torch.Tensor, deep: torch.Tensor, u: torch.Tensor):
    """The method with the attention [V, N] and the noise [V, N] of a case in the place of its own."""

    @dataclass(frozen=True)
    class Fed(TokenCorrelation):
        def _attention(self, layer, state):
            state["flops"] = 0
            return {LOW: low, DEEP: deep}[layer.index]

        def noise(self, tokens):
            return u

    Fed.name = "token-correlation"
    return Fed


@torch.no_grad()
def run(model, keys: torch.Tensor, method, **inputs):
    """Ledger of one prompt whose views have ``keys`` [V, N, D] in the low layer."""

    def replace(module, args, output):
        return torch.cat([output[:, :1], keys], 1)

    layer = model.model.vision_tower.encoder.layers[LOW].self_attn.k_proj
    hook = layer.register_forward_hook(replace)
    n = adapter_for(model).geometry(inputs).n[0]
    ids = torch.tensor([[5, *[IMAGE] * n, 6]])
    try:
        with vlmcompress.compress(model, method) as handle:
            model(input_ids=ids, **inputs)
        return handle.last
    finally:
        hook.remove()


def options(info) -> dict:
    return {name: info[name] for name in ("tau_sim", "tau_num", "iqr_factor", "sampler", "aggregate")}


def single(path):
    info, tensors = load(path)
    keys, low, deep, u = (tensors[name][None] for name in ("keys_low", "attn_low", "attn_deep", "u"))
    return info, tensors, keys, low, deep, u, torch.ones(low.shape, dtype=torch.bool)


@pytest.mark.parametrize("path", cases("token-correlation", kind=("single",)), ids=lambda p: p.stem)
def test_every_step_of_a_sub_image(path):
    info, tensors, keys, low, deep, u, valid = single(path)
    count, redundant = repetition(keys, valid, info["tau_sim"], info["tau_num"])
    assert (count[0] - tensors["sim_count"]).abs().max() <= 1
    assert redundant[0].equal(tensors["redundant"].bool())
    assert int((~redundant).sum()) == info["n_local"]
    q1, q3 = quartiles(deep, valid)
    assert float(q1) == pytest.approx(info["q1"], rel=1e-12)
    assert float(q3) == pytest.approx(info["q3"], rel=1e-12)
    outlier = outliers(deep, valid, info["iqr_factor"])
    assert outlier[0].equal(tensors["global_mask"].bool())
    local = draw(low, (~redundant).sum(1), valid, u, info["sampler"])
    assert local[0].equal(tensors["local_mask"].bool())
    keep = guarded(outlier | local, low, valid)
    assert keep[0].nonzero()[:, 0].equal(tensors["keep_ids"])
    out = tensors["tokens"][None]
    if info["aggregate"] == "merge":
        out, _ = merge_dropped(out, keys, deep, keep, valid)
        torch.testing.assert_close(out[keep], tensors["out_tokens"], atol=1e-5, rtol=0)
    else:
        assert out[keep].equal(tensors["out_tokens"])


@pytest.mark.parametrize("path", cases("token-correlation", kind=("single",)), ids=lambda p: p.stem)
def test_what_a_sub_image_keeps_in_a_model(path):
    info, tensors, keys, low, deep, u, _ = single(path)
    side = round(info["N"] ** 0.5)
    model = model_for(keys.shape[2], side)
    last = run(model, keys, fed(low, deep, u)(**options(info)), pixel_values=torch.randn(1, 3, side, side))
    image = last.samples[0].images[0]
    assert image.kept.equal(tensors["keep_ids"])
    assert last.layer_tokens == [info["kept"]]


@pytest.mark.parametrize("path", cases("token-correlation", kind=("page",)), ids=lambda p: p.stem)
def test_a_page_in_the_packed_sequence(path):
    info, tensors = load(path)
    side, crops = round(info["N"] ** 0.5), info["grid_w"] * info["grid_h"]
    model = model_for(tensors["keys_low"].shape[2], side, (info["grid_h"], info["grid_w"]))
    # the thumbnail comes first; what it looks like must not matter
    keys, low, deep, u = (
        torch.cat([torch.rand(1, *tensors[name].shape[1:]), tensors[name]])
        for name in ("keys_low", "attn_low", "attn_deep", "u")
    )
    size = torch.tensor([[side * info["grid_h"], side * info["grid_w"]]])
    pixels = torch.randn(1, 1 + crops, 3, side, side)
    last = run(model, keys, fed(low, deep, u)(**options(info)), pixel_values=pixels, image_sizes=size)
    assert last.samples[0].images[0].kept.equal(tensors["hf_keep_flat"])


@pytest.mark.parametrize("path", cases("token-correlation", kind=("signals",)), ids=lambda p: p.stem)
def test_keys_and_attention_of_the_tower(path):
    info, tensors = load(path)
    low, deep = info["low"], info["deep"]
    side = round((tensors["hidden_low"].shape[1] - 1) ** 0.5)
    model = model_for(info["num_heads"] * info["head_dim"], side)
    seen = {}

    @dataclass(frozen=True)
    class Watched(TokenCorrelation):
        def entry(self, tokens, state):
            seen.update(state)
            return super().entry(tokens, state)

    Watched.name = "token-correlation"
    hooks = []
    for index, hidden in ((low, tensors["hidden_low"]), (deep, tensors["hidden_deep"])):
        layer = model.model.vision_tower.encoder.layers[index]
        prefix = f"L{index}."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        assert not layer.load_state_dict(weights, strict=False).unexpected_keys
        hooks.append(layer.register_forward_pre_hook(lambda m, args, hidden=hidden: (hidden, *args[1:])))
    views = len(tensors["hidden_low"])
    ids = torch.tensor([[5, *[IMAGE] * side**2, 6]] * views)
    with torch.no_grad(), vlmcompress.compress(model, Watched(low=low, deep=deep, aggregate="merge", tau_sim=0.99)):
        model(input_ids=ids, pixel_values=torch.randn(views, 3, side, side))
    torch.testing.assert_close(seen["keys"], tensors["expected_keys_low"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen["low"], tensors["expected_attn_low"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen["deep"], tensors["expected_attn_deep"], atol=1e-6, rtol=1e-5)
