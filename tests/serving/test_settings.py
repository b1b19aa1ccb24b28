# SPDX-License-Identifier: Apache-2.0
"""What a server is told, what it can count, and what it refuses with a sentence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from matrix.cells import OPTIONS
from serving.cases import CASES, flexible

from vlmcompress import compress, methods, quecc
from vlmcompress.method import create
from vlmcompress.serving.counting import TokenCounter
from vlmcompress.serving.settings import Settings, check_projector


def config_with(entry) -> SimpleNamespace:
    return SimpleNamespace(vlmcompress=entry)


def test_no_entry_is_no_compression():
    assert Settings.of(SimpleNamespace()) is None


def test_overrides_name_a_method_and_its_options():
    settings = Settings.of(config_with({"method": "vtc-cls", "keep": 16, "layers": 2}))
    (method,) = settings.method.methods
    assert (method.name, method.keep, method.layers) == ("vtc-cls", 16, 2)


def test_what_a_compressed_model_saves_is_read():
    model, _, _ = CASES["llava"]()
    with compress(model, "vtc-cls", keep=9):
        settings = Settings.of(model.config)
    assert settings.method == create("vtc-cls", keep=9)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("vtc-cls", "mapping such as"),
        ({"keep": 16}, "names a method"),
        ({"method": "vtc"}, "There is no method 'vtc'; there is"),
        ({"method": "vtc-cls", "keep": 0}, "keeps nothing"),
        ({"method": "vtc-cls", "keep": "64"}, "not '64'"),
        ({"method": "vtc-cls", "budget": 64}, "no option 'budget'"),
        ({"method": "vtc-cls", "positions": "original"}, "cannot be served"),
        ({"method": "vtc-cls", "positions": "best"}, "positions is one of"),
        ({"methods": [], "keep": 3}, "one 'method'"),
    ],
)
def test_bad_entries_get_one_sentence(entry, words):
    with pytest.raises(ValueError, match=words):
        Settings.of(config_with(entry))


def test_positions_follow_the_family():
    assert Settings.of(config_with({"method": "grid", "positions": "original"}), mrope=True)
    with pytest.raises(ValueError, match="cannot be served"):
        Settings.of(config_with({"method": "grid", "positions": "contiguous"}), mrope=True)


@pytest.mark.parametrize(
    ("family", "method", "options", "words"),
    [
        ("llava", "fastv", {}, "inside the language model.*'vtc-cls'"),
        ("llava", "mustdrop", {}, "inside the language model.*'vtc-cls'"),
        ("llava", "h2o", {}, "inside the language model.*'vtc-cls'"),
        ("llava", "keep-last", {}, "inside the language model.*'vtc-cls'"),
        ("llava", "quota", {}, "reads the question"),
        ("llava", "token-correlation", {}, "depends on what an image shows.*'vtc-cls'"),
        ("llava", "globalcom2", {"keep": 0.4}, '"exact_budget": true'),
        ("llava_next", "flowcut", {"keep": 10}, '"llm_layer": null'),
        ("llava_next", "todre", {"keep": 10, "depth": (0.5,)}, '"stage2": "never"'),
        ("llava_next", "vtc-cls", {"keep": 10}, '"newlines": false'),
        ("llava_next", "random", {"keep": 10}, "'grid' works"),
        ("llava_onevision", "random", {"keep": 10}, "'grid' works"),
        ("llava", "no-vision", {}, "keeps no token"),
        ("qwen2_5_vl", "tower-cls", {"keep": 10}, "'tower-cls'"),
    ],
)
def test_methods_that_cannot_be_served_name_one_that_can(family, method, options, words):
    model, _, _ = CASES[family]()
    with pytest.raises(ValueError, match=words):
        TokenCounter(model.config, create(method, **options))


#: with the options of the support matrix; the others act inside the language model, read the question or look first
SERVED = {
    "centerclip", "flowcut", "grid", "none", "pool", "random", "resize", "todre", "tokenflex", "tome", "tower-cls", "vtc-cls",
}  # fmt: skip
REFUSAL = r"'[\w-]+' (cannot be served.*; .* works.*|keeps no token.*; send prompts without images)\.$"


@pytest.mark.parametrize("method", methods())
def test_every_method_is_served_or_names_what_works(method):
    model, _, shape = flexible("llava") if method.startswith("tokenflex") else CASES["llava"]()
    if method in SERVED:
        assert 1 <= TokenCounter(model.config, create(method, **OPTIONS[method]))(*shape) <= 36
        return
    with pytest.raises(ValueError, match=REFUSAL):
        TokenCounter(model.config, create(method, **OPTIONS[method]))


def test_trained_projectors_need_their_method():
    model, _, _ = flexible("llava")
    with pytest.raises(ValueError, match=r'say {"vlmcompress": {"method": "tokenflex", "keep": 9}}'):
        check_projector(model.config, None)
    check_projector(model.config, Settings.of(config_with({"method": "tokenflex", "keep": 9})))
    other, _, _ = CASES["llava"]()
    check_projector(other.config, None)
    quecc.install(other, tokens=4)
    for settings in (None, Settings.of(config_with({"method": "grid"}))):
        with pytest.raises(ValueError, match=r"reads the question.*TokenFLEX projector can"):
            check_projector(other.config, settings)


@pytest.mark.parametrize(
    ("family", "method", "options"),
    [
        ("llava_next", "todre", {"keep": 10, "stage2": "never"}),
        ("llava_next", "vtc-cls", {"keep": 10, "newlines": False}),
        ("llava_next", "globalcom2", {"keep": 0.4, "exact_budget": True}),
        ("llava_next", "grid", {"keep": 10}),
        ("llava", "flowcut", {"keep": 10, "llm_layer": None}),
    ],
)
def test_what_the_refusals_name_works(family, method, options):
    model, _, _ = CASES[family]()
    TokenCounter(model.config, create(method, **options))


def test_counting_leaves_the_random_numbers_alone():
    model, _, shape = CASES["llava"]()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert TokenCounter(model.config, create("random", keep=7))(*shape) == 7
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_share_follows_the_size():
    model, _, _ = CASES["qwen2_5_vl"]()
    count = TokenCounter(model.config, create("vtc-cls", keep=0.25))
    assert [count(1, h, w) for h, w in ((8, 8), (8, 16), (4, 20))] == [4, 8, 5]
