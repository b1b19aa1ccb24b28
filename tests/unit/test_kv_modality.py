# SPDX-License-Identifier: Apache-2.0
"""Budgets by modality of every cache policy that has them, and what becomes of other libraries' policies."""

from __future__ import annotations

import pytest
import torch
from models import prompts, tiny_llava

import vlmcompress

GREEDY = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[3], return_dict_in_generate=True)
POLICIES = {
    "h2o": {"heavy": 12, "recent": 4},
    "a2sf": {"budget": 16, "recent": 4},
    "keyformer": {"budget": 16, "recent": 4, "noise": False},
    "lazyeviction": {"budget": 16, "window": 4, "alpha": 0.0},
}


@pytest.mark.parametrize("name", POLICIES)
@torch.no_grad()
def test_the_share_of_visual_entries_is_what_was_asked(name):
    """36 visual and 16 text tokens compete for the 12 places outside the window of the 4 newest."""
    model, inputs = tiny_llava(eos_token_id=None), prompts([[9, "image", 7]], 36)
    found = {}
    for share in (0.0, 0.25, 0.5, 1.0):
        with vlmcompress.compress(model, name, visual_share=share, **POLICIES[name]) as handle:
            cache = model.generate(**inputs, **GREEDY).past_key_values
            entries = handle.cache_entries(cache)
        layers = [visual for visual, _ in entries]
        assert max(layers) == min(layers)
        found[share] = layers[0]
        held = cache.layers[0].keys
        assert sum(entries[0]) == held.shape[2]
        assert not (held[0, 0] == 0).all(-1).any()
    assert found == {0.0: 0, 0.25: 3, 0.5: 6, 1.0: 12}


@torch.no_grad()
def test_what_is_evicted_is_freed():
    """The storage of the cache is that of the budget, with a few entries of room, and stays so while decoding."""
    model, inputs = tiny_llava(eos_token_id=None), prompts([[9, "image", 27]], 36)
    with vlmcompress.compress(model, "h2o", heavy=10, recent=10) as handle:
        output = model.generate(**inputs, **GREEDY | {"max_new_tokens": 40})
        entry = 2 * 16 * 4  # heads, width, bytes
        assert handle.report().kv_bytes == 4 * 2 * 20 * entry
        for layer in output.past_key_values.layers:
            for held in (layer.keys, layer.values):
                assert held.shape[2] == 20
                assert held.untyped_storage().nbytes() <= (20 + 1 + 16) * entry


def test_a_press_of_kvpress_is_refused_with_the_reason():
    press = type("KnormPress", (), {"__module__": "kvpress.presses.knorm_press"})()
    model = tiny_llava()
    with pytest.raises(ValueError, match=r"KnormPress.*transformers below 5\.3"):
        vlmcompress.compress(model, press)
    assert not hasattr(model.config, "vlmcompress")
