# SPDX-License-Identifier: Apache-2.0
"""TransPrune against numbers from the authors' code, through ``compress`` on the stock LLaVA class."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from inside_llava import Feed, build, greedy, inputs
from safetensors.torch import load_file
from vectors import cases

import vlmcompress
from vlmcompress.methods.transprune import TransPrune
from vlmcompress.ops.transition import transition_scalars, transition_weight

CLOSE = dict(atol=1e-4, rtol=1e-4)
SCORES = dict(atol=1e-6, rtol=1e-4)


class Recorder(TransPrune):
    """Takes note of what each stage saw."""

    seen: ClassVar[dict] = {}

    def score(self, layer, state):
        stage = self.seen.setdefault(layer.index + 1, {"hidden_in": layer.hidden})
        stage["score"] = super().score(layer, state)[0] * 2  # alpha 0.5 halves the official sum
        return stage["score"][None] / 2

    def transition(self, layer, state):
        for number, magnitude, cosine in state.get("pending", []):
            raw = self.seen.setdefault("raw", {})
            raw[number] = raw.get(number, 0) + transition_weight(magnitude, cosine, layer.frame.valid)
        ttv = super().transition(layer, state)
        self.seen[layer.index + 1]["ttv"] = ttv[0] / ttv[0].sum()
        return ttv

    def guidance(self, layer):
        iga = super().guidance(layer)
        self.seen[layer.index + 1]["iga"] = iga[0] / iga[0].sum()
        return iga


@pytest.mark.parametrize("path", cases("transprune", kind=("end_to_end_llm",)), ids=lambda p: p.stem)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cases(path, attention):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    layout, hyper = info["layout"], info["hyper"]
    start, n = layout["image_start"], layout["n_image"]
    tokens = tensors["gen_tokens"]
    placeholder = next(t for t in range(info["config"]["vocab_size"]) if t not in tokens.tolist())
    model = build(info["config"], tensors, n, placeholder)
    model.set_attn_implementation(attention)
    embeds = tensors["inputs_embeds"]
    method = Recorder(
        layers=hyper["prune_after_layers_1based"],
        fractions=hyper["keep_ratios_of_original"],
        accumulate=hyper["accumulate_layers_1based"],
        alpha=hyper["alpha"],
    )
    with torch.no_grad(), vlmcompress.compress(model, Feed(embeds[0, start : start + n]) + method) as handle:
        final = model.model(**inputs(model, embeds, start, n)).last_hidden_state
        Recorder.seen.clear()
        first = model(**inputs(model, embeds, start, n), use_cache=True)
        logits = greedy(model, first, tokens)
        image = handle.last.samples[0].images[0]
        per_layer, lengths = handle.last.layer_tokens, handle.last.cache_lengths
        method_scores = image.scores()
    for stage, (after, k) in enumerate(zip(hyper["prune_after_layers_1based"], hyper["keep_counts"], strict=True), 1):
        kept = image.kept_at(after)
        torch.testing.assert_close(kept, tensors[f"stage{stage}.kept_global"])
        assert per_layer[after] == k
    assert lengths == info["kv_lens_per_layer"]
    real = final[0].abs().sum(-1) > 0
    torch.testing.assert_close(final[0, real], tensors["final_hidden"][0], **CLOSE)
    torch.testing.assert_close(logits[0], tensors["prefill_logits"][0], **CLOSE)
    finite = tensors["gen_logits"].isfinite()
    torch.testing.assert_close(logits[finite], tensors["gen_logits"][finite], **CLOSE)
    for number, raw in Recorder.seen.pop("raw").items():
        torch.testing.assert_close(raw, tensors[f"layer{number}.ttv_raw"], **CLOSE)
    assert len(Recorder.seen) == len(set(hyper["keep_counts"]) - {n})
    for after, seen in Recorder.seen.items():
        stage = hyper["prune_after_layers_1based"].index(after) + 1
        for name, value in seen.items():
            wanted = tensors[f"stage{stage}.{name}"]
            torch.testing.assert_close(value, wanted, **(CLOSE if name == "hidden_in" else SCORES))
    stage = next(i for i, k in enumerate(hyper["keep_counts"], 1) if k < n)
    torch.testing.assert_close(2 * method_scores[:n], tensors[f"stage{stage}.score"], **SCORES)


@pytest.mark.parametrize("path", cases("transprune", kind=("function_compute_transf_weight",)), ids=lambda p: p.stem)
def test_transition_weight(path):
    tensors = load_file(path.with_suffix(".safetensors"))
    for case in ("t0", "t1", "t2"):
        weight = transition_weight(*transition_scalars(tensors[f"{case}.before"], tensors[f"{case}.after"], chunk=7))
        torch.testing.assert_close(weight, tensors[f"{case}.ttv"], atol=1e-6, rtol=1e-5)
    # officially the softmax runs over the whole batch; ours differs by the ratio of the denominators
    magnitude, cosine = transition_scalars(tensors["t3.before"], tensors["t3.after"])
    own = (1 - cosine).exp().sum(1, keepdim=True)
    torch.testing.assert_close(
        transition_weight(magnitude, cosine) * own / own.sum(), tensors["t3.ttv"], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("path", cases("transprune", kind=("end_to_end_llm",))[:1], ids=lambda p: p.stem)
def test_module_tensors(path):
    tensors = load_file(path.with_suffix(".safetensors"))
    for key in [k for k in tensors if k.endswith("attn_in")]:
        layer = key.split(".")[0]
        pairs = [(tensors[f"{layer}.{part}_in"], tensors[f"{layer}.{part}_out"]) for part in ("attn", "ffn")]
        weight = sum(transition_weight(*transition_scalars(x, y)) for x, y in pairs)
        torch.testing.assert_close(weight, tensors[f"{layer}.ttv_raw"], atol=1e-6, rtol=1e-5)
