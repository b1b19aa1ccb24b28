# SPDX-License-Identifier: Apache-2.0
"""The tokens that a server makes are those that the compressed model feeds, for every served family and method."""

from __future__ import annotations

import pytest
import torch
from serving.cases import CASES, LLAVA_ONLY, METHODS, flexible, given_of

from vlmcompress import compress
from vlmcompress.method import create
from vlmcompress.serving.counting import TokenCounter
from vlmcompress.serving.half import vision_half
from vlmcompress.serving.tokens import VisualEncoder

PAIRS = [(family, method) for family in CASES for method in METHODS] + [("llava", method) for method in LLAVA_ONLY]
OPTIONS = {**METHODS, **LLAVA_ONLY}


def half_of(model):
    """The vision half of ``model``, with its weights."""
    half = vision_half(model.config)
    weights = {k: v for k, v in model.state_dict().items() if "language_model" not in k and "lm_head" not in k}
    missing, unexpected = half.load_state_dict(weights, strict=False)
    assert not unexpected and all("language_model" in name or "lm_head" in name for name in missing)
    return half


def fed(model, inputs, method: str, options: dict) -> torch.Tensor:
    """What the compressed model puts in front of its first decoder layer for the one image of the prompt."""
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with compress(model, method, **options) as handle, torch.no_grad():
        model(**inputs)
        kept = handle.last.samples[0].images[0].kept
        column = handle.last.layout.column[0][: handle.last.samples[0].images[0].n_original]
    hook.remove()
    first = int(column[0])
    return seen[0][0, first : first + len(kept)]


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_tokens_are_those_of_the_compressed_model(family, method):
    model, inputs, shape = CASES[family]()
    check(model, given_of(inputs, family), inputs, shape, method, OPTIONS[method])


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "internvl"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("tokenflex", {"keep": 9}),
        ("tokenflex", {"keep": 4, "per_view": True}),
        ("tokenflex", {"keep": 0.5}),
        ("vtc-cls", {"keep": 10, "newlines": False}),
        ("none", {}),
    ],
)
def test_tokens_of_a_flexible_projector(family, method, options):
    model, inputs, shape = flexible(family)
    check(model, given_of(inputs, family), inputs, shape, method, options)


def check(model, given: dict, inputs: dict, shape: tuple[int, ...], method: str, options: dict) -> None:
    """The encoder makes what the compressed model feeds, and the counter knows how many."""
    expected = fed(model, inputs, method, options)
    encoder = VisualEncoder(half_of(model), create(method, **options))
    (tokens,) = encoder(given)
    width = model.config.get_text_config().hidden_size
    torch.testing.assert_close(tokens[:, :width], expected, atol=1e-6, rtol=0)
    assert TokenCounter(model.config, create(method, **options))(*shape) == len(tokens)


def test_deepstack_features_follow_as_channels():
    model, inputs, _ = CASES["qwen3_vl"]()
    given = given_of(inputs, "qwen3_vl")
    encoder = VisualEncoder(half_of(model), create("grid", keep=6))
    tokens, _, selection = encoder.choose(given)
    with torch.no_grad():
        stock = model.model.get_image_features(**given, return_dict=True)
    parts = (stock.pooler_output, *stock.deepstack_features)  # per image, or all in one: versions differ
    layers = [part if isinstance(part, torch.Tensor) else torch.cat(list(part)) for part in parts]
    expected = torch.cat([layer[selection.keep[0]] for layer in layers], dim=-1)
    torch.testing.assert_close(tokens[0], expected, atol=1e-6, rtol=0)


def test_a_batch_is_each_image_alone():
    model, _, _ = CASES["llava"]()
    encoder = VisualEncoder(half_of(model), create("flowcut", keep=10))
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(5))
    together = encoder({"pixel_values": pixels})
    for rows, view in zip(together, pixels, strict=True):
        torch.testing.assert_close(rows, encoder({"pixel_values": view[None]})[0], atol=1e-5, rtol=0)
