# SPDX-License-Identifier: Apache-2.0
"""Models whose weights are elsewhere until their module runs (``device_map`` with offloading): hooks find what they need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

import vlmcompress

sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
from cells import OPTIONS
from stories import STORIES

#: of every way to look at a model: vision rows, next layer's CLS, whole tokens, decoder rows, values, cache (stock towers
#: cannot interpolate positions that are offloaded, as resize asks them to)
METHODS = [
    "vtc-cls",
    "globalcom2",
    "flowcut",
    "tome",
    "token-correlation",
    "transprune",
    "todre",
    "mustdrop",
    "h2o",
]


# the stock LLaVA-NeXT cannot be offloaded: its newline belongs to no module that runs
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl", "smolvlm", "gemma3"])
@torch.no_grad()
def test_an_offloaded_model_answers_alike(family):
    story = STORIES[family]
    model, away = story.build("sdpa"), cpu_offload(story.build("sdpa"), torch.device("cpu"))
    assert {p.device.type for p in away.parameters()} == {"meta"}
    inputs = story.write(model, story.specs["ragged"])
    options = dict(max_new_tokens=3, do_sample=False, suppress_tokens=list(story.special))
    for name in METHODS:
        if not vlmcompress.support(name, family)[0]:
            continue
        with vlmcompress.compress(model, name, **OPTIONS[name]) as handle:
            expected, images = model.generate(**inputs, **options), handle.last.samples[0].images
        with vlmcompress.compress(away, name, **OPTIONS[name]) as handle:
            assert away.generate(**inputs, **options).equal(expected), name
            assert [i.kept.tolist() for i in handle.last.samples[0].images] == [i.kept.tolist() for i in images]
