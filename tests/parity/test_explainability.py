# SPDX-License-Identifier: Apache-2.0
"""Relevance, labels, first-layer maps and the predictor against the project's reference numbers (no official code)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from vectors import cases

from vlmcompress.ops.relevance import (
    kept_of_ratio,
    kept_tokens,
    masked_mean,
    relevance_labels,
    relevance_loss,
    roll_out,
)
from vlmcompress.ops.scores import causal_attention_rows
from vlmcompress.relevance import RelevancePredictor, answer_relevance

PATHS = cases("explainability")


def of(where) -> list:
    return [p for p in PATHS if not hasattr(p, "read_text") or where(json.loads(p.read_text()))]


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def build(case, tensors):
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config, model = kinds[case.get("model", "llama")]
    model = model(config(**case["config"], attn_implementation="eager")).eval()
    model.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("w.")})
    return model.requires_grad_(False)


def modules(model):
    return [layer.self_attn for layer in model.model.layers]


def logits_of(model):
    return lambda embeds: model(inputs_embeds=embeds, use_cache=False).logits


def first_layer_map(model, embeds, rows):
    """From the first layer's projections of the asked rows alone, as a compressed model does it."""
    layer = model.model.layers[0]
    x, rows = layer.input_layernorm(embeds), torch.tensor([list(rows)])
    heads = layer.self_attn.head_dim
    rope = model.model.rotary_emb(embeds, torch.arange(embeds.shape[1])[None])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    query, key = (
        p(x).unflatten(-1, (-1, heads)).transpose(1, 2) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rope)
    attention = causal_attention_rows(query[:, :, rows[0]], key, rows, heads**-0.5, None)
    return masked_mean(attention.mean(1), torch.ones(rows.shape, dtype=torch.bool))[0]


@pytest.mark.parametrize("path", of(lambda c: "answer_tokens" in c))
def test_relevance(path):
    case, tensors = load(path)
    model, prompt = build(case, tensors), tensors["inputs_embeds"]
    system, visual = case["Ns"], case["Nv"]
    answer, span = case["answer_tokens"], slice(system, system + visual)
    more = model.get_input_embeddings()(torch.tensor([answer[:-1]], dtype=torch.long))
    embeds = torch.cat([prompt, more], 1)
    n = prompt.shape[1]
    steps = answer_relevance(modules(model), logits_of(model), embeds, n, answer)[:, span]
    torch.testing.assert_close(steps, tensors["relevance_per_step"], rtol=1e-4, atol=1e-7)
    relevance = steps.mean(0)
    torch.testing.assert_close(relevance, tensors["relevance"], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(relevance_labels(relevance[None])[0], tensors["label"], rtol=1e-4, atol=1e-7)
    for share in (50, 25):
        assert kept_tokens(relevance[None], share / 100)[0].equal(tensors[f"kept_{share}"])
    other = answer_relevance(modules(model), logits_of(model), prompt, n, answer[:1], logprob=True)[0, span]
    torch.testing.assert_close(other, tensors["relevance_step0_if_target_is_logprob"], rtol=1e-4, atol=1e-7)
    found = first_layer_map(model, prompt, range(system + visual, n))[span]
    torch.testing.assert_close(found, tensors["first_layer_map"], atol=1e-6, rtol=0)
    # the streamed row is the row of the whole matrices
    embeds = prompt.detach().requires_grad_(True)
    output = model(inputs_embeds=embeds, use_cache=False, output_attentions=True)
    gradients = torch.autograd.grad(output.logits[0, -1, answer[0]], output.attentions)
    whole = torch.eye(n)[None]
    for attention, gradient in zip(output.attentions, gradients, strict=True):
        whole = whole + (attention * gradient).clamp_min(0).mean(1) @ whole
    row = roll_out([a.detach() for a in output.attentions], gradients, n - 1)
    torch.testing.assert_close(row, whole[:, n - 1].detach(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(row[0, span], tensors["relevance_per_step"][0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("path", of(lambda c: c["what"].startswith("compressor forward")))
def test_predictor(path):
    case, tensors = load(path)
    predictor = RelevancePredictor(kernel=case["kernel"])
    predictor.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith("c.")})
    assert sum(p.numel() for p in predictor.parameters()) == case["params"]
    maps, mask = tensors["first_layer_map"], tensors["mask"].bool()
    logits = predictor(maps, mask).detach()
    torch.testing.assert_close(logits.softmax(-1), tensors["prediction"], atol=1e-6, rtol=0)
    label = relevance_labels(tensors["raw_relevance"], mask)
    torch.testing.assert_close(label, tensors["label"], atol=1e-6, rtol=0)
    torch.testing.assert_close(relevance_loss(label, logits), tensors["kl_per_row"], atol=1e-5, rtol=0)
    for row, kept in enumerate(kept_tokens(logits, 0.25, mask)):
        assert kept.equal(tensors[f"kept_25_row{row}"])
        alone = predictor(maps[row : row + 1, mask[row]]).detach()
        torch.testing.assert_close(alone[0], logits[row, mask[row]], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("path", of(lambda c: "edge" in c))
def test_edges(path):
    case, _ = load(path)
    edge = case["edge"]
    seven = relevance_labels(torch.tensor([[0.0, 7.0, 3.0, 1.0, 9.0, 4.0, 2.0]]))[0]
    torch.testing.assert_close(seven, torch.tensor(edge["labels_odd_7"]), atol=1e-6, rtol=0)
    assert relevance_labels(torch.ones(1, 8))[0].tolist() == edge["labels_constant_scores"]
    assert kept_tokens(torch.ones(1, 8), 0.5)[0].tolist() == edge["keep_ties"]
    assert kept_tokens(torch.rand(1, 4), 1.0)[0].tolist() == edge["keep_ratio_1"]
    assert kept_tokens(torch.arange(10.0)[None], 0.0)[0].tolist() == edge["keep_ratio_0"]
    assert len(kept_tokens(torch.rand(1, 3), 0.5)[0]) == len(edge["keep_N3_ratio_0.5"])
    assert not relevance_labels(torch.zeros(1, 5)).any() and kept_of_ratio(0.5, 0) == 0


def test_predictor_file(tmp_path):
    torch.manual_seed(0)
    predictor = RelevancePredictor((4, 8), scale_by_length=True)
    predictor.save(tmp_path / "predictor.safetensors")
    again = RelevancePredictor.load(tmp_path / "predictor.safetensors")
    maps = torch.rand(2, 9)
    assert again(maps).equal(predictor(maps)) and again.options == predictor.options
    with pytest.raises(ValueError, match="no predictor"):
        RelevancePredictor.load(tmp_path / "other")
    with pytest.raises(ValueError, match="odd kernel"):
        RelevancePredictor(kernel=2)


def test_fused_attention_is_refused():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    model = LlamaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="eager"):
        answer_relevance(modules(model), logits_of(model), torch.randn(1, 4, 16), 4, [3])
    with pytest.raises(ValueError, match="are no prompt"):
        answer_relevance(modules(model), logits_of(model), torch.randn(1, 4, 16), 4, [3, 5])
    assert not any(module._forward_hooks for module in modules(model))
