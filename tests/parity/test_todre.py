# SPDX-License-Identifier: Apache-2.0
"""ToDRE against the project's reference numbers (no official code exists)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from inside_llava import build, feed, inputs
from models import prompts, row_alone, tiny_llava
from models_next import one_row, prompts_next, tiny_next
from models_qwen import prompts_qwen, row_of, tiny_qwen
from safetensors.torch import load_file
from vectors import cases

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.adapters.raster import raster_layout
from vlmcompress.methods.todre import ToDRE, kept_of
from vlmcompress.ops.diversity import diverse_order
from vlmcompress.views import EntryTokens

PATHS = cases("todre")


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def of(where) -> list:
    return [p for p in PATHS if not hasattr(p, "read_text") or where(json.loads(p.read_text()))]


@pytest.mark.parametrize("path", of(lambda c: "stage 1" in c["what"] and "ratio" in c))
def test_orders(path):
    case, tensors = load(path)
    x, k, pivot = tensors["x"][None], case["k"], torch.tensor([case["pivot"]])
    assert kept_of(case["ratio"], case["N"]) == k
    for rule, name in (("maxsum", ""), ("kcenter", "_v1_kcenter")):
        order = diverse_order(x, pivot, k, rule=rule)[0]
        assert order.equal(tensors[f"order{name}"])
        twice = diverse_order(torch.cat([x, x.flip(1)]), torch.cat([pivot, case["N"] - 1 - pivot]), k, rule=rule)
        assert twice[0].equal(order) and (case["N"] - 1 - twice[1]).equal(order)


@pytest.mark.parametrize("path", of(lambda c: "stage 1" in c["what"] and "ratio" in c))
def test_entry(path):
    """The method's own pivot and choice, on a raster of tokens that nothing projects."""
    case, tensors = load(path)
    attention = tensors["cls_attention"]
    views = attention.view(-1, attention.shape[-1])
    layout = raster_layout(1, (1, case["N"]), torch.device("cpu"))
    if case["pivot_allowed_range"] is not None:
        start, end = case["pivot_allowed_range"]
        wide = torch.full((1, case["N"]), float("-inf"))
        wide[0, start:end] = attention.flatten()[: end - start]
        views = wide
    tokens = EntryTokens(layout, tensors["x"][None], None)
    selection = ToDRE(keep=case["ratio"]).entry(tokens, {"cls": views.reshape(1, -1)})
    assert selection.keep[0].equal(tensors["kept_sorted"])


@pytest.mark.parametrize("path", of(lambda c: "pivots" in c))
def test_pivots(path):
    case, tensors = load(path)
    tokens = EntryTokens(raster_layout(1, (20, 20), torch.device("cpu")), tensors["x"][None], None)
    for pivot, number in case["pivots"].items():
        state: dict = {}
        method = ToDRE(keep=case["k"], pivot=pivot)
        assert method.first(tokens.features, tokens.layout, state).tolist() == [number]
        selection = method.entry(tokens, state)
        assert selection.keep[0].equal(tensors[f"order_{pivot}"].sort().values)
        assert state["scores"][0].argsort(descending=True)[: case["k"]].equal(tensors[f"order_{pivot}"])


@pytest.mark.parametrize("path", of(lambda c: c["what"].startswith("edges")))
def test_edges(path):
    case, tensors = load(path)
    for name, order in tensors.items():
        if name.startswith("order_k") and len(order):
            found = diverse_order(tensors["x"][None], torch.tensor([case["pivot"]]), len(order))[0]
            assert found.equal(order)


@dataclass(frozen=True, eq=False)
class Fed(ToDRE):
    """ToDRE's second stage behind given embeddings."""

    embeddings: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 1))
    seen: dict = field(default_factory=dict)

    def entry(self, tokens, state):
        return feed(self.embeddings)

    def prefill(self, layer, state):
        answer = super().prefill(layer, state)
        self.seen[layer.index] = [float(x[0]) for x in state["ratios"]]
        return answer

    def options(self):
        return {}


@pytest.mark.parametrize("path", of(lambda c: "stage 2" in c["what"]))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_second_stage(path, attention):
    case, tensors = load(path)
    visual = tensors["visual_index"]
    start, n = int(visual[0]), len(visual)
    ids = case["greedy_ids_after_prefill"]
    placeholder = next(t for t in range(case["config"]["vocab_size"]) if t not in ids)
    model = build(case["config"], tensors, n, placeholder)
    model.set_attn_implementation(attention)
    embeds = tensors["inputs_embeds"]
    given = inputs(model, embeds, start, n)
    system = int(start) if not (tensors["text_index"] < start).any() else 0
    method = Fed(tau=case["tau"], system_tokens=system, embeddings=embeds[0, start : start + n])
    with vlmcompress.compress(model, method) as handle:
        out = model(**given, use_cache=True)
        probe = case["probe_layer_0based"]
        alphas = case["alpha_t2v_and_v2t_per_layer"][str(probe)]
        assert method.seen[probe] == pytest.approx(alphas, abs=1e-5)
        assert (handle.last.layer_tokens[-1] == 0) == case["fires"]
        text = torch.cat([out.logits[0, :start], out.logits[0, given["inputs_embeds"].shape[1] - (37 - start - n) :]])
        torch.testing.assert_close(text, tensors["logits_text_positions"], atol=1e-4, rtol=1e-4)
        cache, found, logits = out.past_key_values, [], out.logits[0, -1]
        for _ in ids:
            found.append(int(logits.argmax()))
            logits = model(input_ids=torch.tensor([[found[-1]]]), cache=cache, use_cache=True).logits[0, -1]
        assert found == ids


@pytest.mark.parametrize("path", of(lambda c: "probe layer" in c["what"]))
def test_tables(path):
    case, _ = load(path)
    model = tiny_llava()

    class Deep:
        def __init__(self, depth):
            self.decoder_layers = range(depth)

    for depth, (probe, behind) in case["layers"].items():
        assert ToDRE().cut_layers(Deep(int(depth))) == [probe] and int(depth) - 1 - probe == behind
    for words, k in case["k"].items():
        n, ratio = (float(word.split("=")[1]) for word in words.split())
        assert kept_of(ratio, int(n)) == k
    assert list(ToDRE().cut_layers(adapter_for(model))) == []


SPEC = [[5, "image", 7], [2, "image", 3], [9, "image", 12, "image", 2]]
OPTIONS = [{"keep": 9}, {"keep": 0.2, "rule": "kcenter", "stage2": "always", "depth": (0.5,)},
           {"keep": 12, "pivot": "random", "tau": 0.4, "depth": (0.25, 0.5)}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_batches(options):
    greedy = dict(max_new_tokens=4, do_sample=False)
    batches = []
    model, batch = tiny_llava(eos_token_id=None), prompts(SPEC, 36)
    batches.append((model, batch, [row_alone(batch, SPEC, r) for r in range(3)]))
    model = tiny_next(eos_token_id=None)
    batch = prompts_next(model, [[5, "square", 7], [2, "wide", 3]])
    batches.append((model, batch, [one_row(batch, r, slice(r, r + 1)) for r in range(2)]))
    batch = prompts_qwen([[5, (4, 6), 7], [2, (6, 6), 3]])
    batches.append((tiny_qwen(), batch, [row_of(batch, r) for r in range(2)]))
    for model, batch, rows in batches:
        with vlmcompress.compress(model, "todre", **options) as handle:
            together, ledger = model.generate(**batch, **greedy), handle.last
            for number, row in enumerate(rows):
                assert model.generate(**row, **greedy)[0, -4:].equal(together[number, -4:])
                for image, alone in zip(ledger.samples[number].images, handle.last.samples[0].images, strict=True):
                    assert image.kept.equal(alone.kept) and image.kept_at(3).equal(alone.kept_at(3))
                    assert not image.is_newline[image.kept].any()


@torch.no_grad()
def test_keeping_everything():
    model, batch = tiny_llava(eos_token_id=None), prompts(SPEC, 36)
    before = model(**batch).logits
    with vlmcompress.compress(model, "todre", keep=1.0):
        assert model(**batch).logits.equal(before)
