# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a prefill with a method at work, its own arithmetic included: as torch counts them, and whatever the batch."""

from __future__ import annotations

import pytest
import torch
from models import prompts, tiny_llava
from torch.utils.flop_counter import FlopCounterMode

import vlmcompress
from vlmcompress.eval.flops import ModelShape, full
from vlmcompress.eval.profiles import compressed

N = 64
METHODS = [
    ("vtc-cls", {"keep": 9}), ("flowcut", {"keep": 9}), ("mustdrop", {"keep": 40}), ("tome", {"keep": 16}),
    ("fastv", {"keep": 9}), ("transprune", {}), ("globalcom2", {"keep": 9}), ("h2o", {}), ("a2sf", {}), ("keyformer", {}),
    ("tokenselect", {}), ("explainability", {"keep": 9, "predictor": "identity"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    # torch counts eager attention only
    return tiny_llava(attention="eager", side=8, num_hidden_layers=6)


def ledger_of(model, inputs, method, options):
    with vlmcompress.compress(model, method, **options) as handle, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs, use_cache=True, logits_to_keep=1)
        return handle.last, counter.get_total_flops()


@pytest.mark.parametrize(("method", "options"), METHODS, ids=[name for name, _ in METHODS])
def test_as_torch_counts(model, method, options):
    ledger, total = ledger_of(model, prompts([[20, "image", 20]], N, image_size=32), method, options)
    (profile,) = compressed(ModelShape.from_config(model.config), ledger)
    assert full(ModelShape.from_config(model.config), profile) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(("method", "options"), [("flowcut", {"keep": 9}), ("mustdrop", {}), ("tome", {"keep": 16})])
def test_towers_of_a_batch_cost_what_they_cost_alone(model, method, options):
    rows = [[20, "image", 20], [9, "image", 3], [4, "image", 8]]
    together = prompts(rows, N, image_size=32)
    profiles = compressed(ModelShape.from_config(model.config), ledger_of(model, together, method, options)[0])
    for number, (row, profile) in enumerate(zip(rows, profiles, strict=True)):
        alone = {**prompts([row], N, image_size=32), "pixel_values": together["pixel_values"][number : number + 1]}
        (single,) = compressed(ModelShape.from_config(model.config), ledger_of(model, alone, method, options)[0])
        assert (profile.tower, profile.tower_pairs) == (single.tower, single.tower_pairs)
