# SPDX-License-Identifier: Apache-2.0
"""TransPrune and MustDrop on tiled images and on packed towers: batches, their rows alone, keep-all."""

from __future__ import annotations

import pytest
import torch
from models_next import one_row, prompts_next, tiny_next
from models_qwen import prompts_qwen, row_of, tiny_qwen

import vlmcompress

GREEDY = dict(max_new_tokens=3, do_sample=False)
METHODS = [
    ("transprune", {"layers": (1, 2, 3), "fractions": (0.8, 0.5, 0.2)}),
    ("transprune", {"keep": 0.5}),
    ("transprune", {"keep": 70}),
    ("mustdrop", {"layers": (0, 1), "gamma": 0.02, "alpha": 0.05, "similarity": 0.4}),
    ("mustdrop", {"layers": (0, 1), "keep": 0.5, "similarity": 0.4}),
]


def alone_equals_batch(model, inputs, rows, name, options):
    depth = model.config.text_config.num_hidden_layers
    with vlmcompress.compress(model, name, **options) as handle:
        batch, ledger = model.generate(**inputs, **GREEDY), handle.last
        assert ledger.layer_tokens[-1] < ledger.layer_tokens[0]
        for number, row in enumerate(rows):
            assert model.generate(**row, **GREEDY)[0, -3:].equal(batch[number, -3:])
            for image, single in zip(ledger.samples[number].images, handle.last.samples[0].images, strict=True):
                assert all(image.kept_at(layer).equal(single.kept_at(layer)) for layer in range(depth))


@pytest.mark.parametrize(("name", "options"), METHODS)
@torch.no_grad()
def test_tiled_images(name, options):
    model = tiny_next(eos_token_id=None, num_hidden_layers=5)
    inputs = prompts_next(model, [[5, "square", 7], [2, "wide", 3], [4, "tall", 3, "row", 5]])
    rows = [one_row(inputs, row, images) for row, images in enumerate((slice(0, 1), slice(1, 2), slice(2, 4)))]
    alone_equals_batch(model, inputs, rows, name, options)


@pytest.mark.parametrize(("name", "options"), METHODS)
@torch.no_grad()
def test_packed_tower(name, options):
    model = tiny_qwen()
    if name == "transprune" and options.get("keep") == 70:
        options = {"keep": 15}
    inputs = prompts_qwen([[5, (4, 6), 7], [2, (6, 6), 3, (2, 8), 4]])
    alone_equals_batch(model, inputs, [row_of(inputs, row) for row in range(2)], name, options)


@pytest.mark.parametrize(
    ("name", "options"), [("transprune", {"keep": 1.0}), ("mustdrop", {"keep": 1.0, "merge": False})]
)
@torch.no_grad()
def test_keeping_all(name, options):
    tiled = tiny_next()
    cases = (tiled, prompts_next(tiled, [[5, "square", 7]])), (tiny_qwen(), prompts_qwen([[5, (4, 6), 7]]))
    for model, inputs in cases:
        before = model(**inputs).logits
        with vlmcompress.compress(model, name, **options):
            assert model(**inputs).logits.equal(before)
