# SPDX-License-Identifier: Apache-2.0
"""The KV-cache policies against the authors' numbers, through ``compress`` on a stock class."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from scripted import Scripted, from_rows
from vectors import cases

from vlmcompress.methods.a2sf import A2SF
from vlmcompress.methods.keyformer import Keyformer
from vlmcompress.methods.lazyeviction import LazyEviction
from vlmcompress.methods.tokenselect import TokenSelect
from vlmcompress.ops.kv import recurrence, retain, soft_votes
from vlmcompress.ops.rope import rotate
from vlmcompress.views import AttendLayer


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def of(method: str, *, where) -> list:
    """Cases whose description passes ``where``; the skipped entry where there are none to read."""
    return [c for c in cases(method) if not hasattr(c, "read_text") or where(json.loads(c.read_text()))]


def scripted_rows(case, tensors) -> Scripted:
    """Attention rows over whatever was in the cache, as logits by token."""
    prompt, steps = case["prompt"], case["steps"]
    n = prompt + steps
    first = tensors["attn_prefill"].reshape(-1, prompt, prompt)
    rows = [torch.full((len(first), n), -1e4) for _ in range(n)]
    for q in range(prompt):
        rows[q][:, :prompt] = first[:, q].clamp_min(1e-37).log()
    held = tensors["kept_00"]
    for step in range(1, steps + 1):
        row = tensors[f"attn_{step:02d}"].reshape(len(first), -1)
        new = prompt + step - 1
        columns = torch.cat([held, torch.full((len(first), 1), new)], dim=1)
        rows[new].scatter_(1, columns, row.clamp_min(1e-37).log())
        held = tensors[f"kept_{step:02d}"]
    return from_rows(rows)


@torch.no_grad()
def check_rows(case, tensors, method, **options):
    run, prompt = scripted_rows(case, tensors), case["prompt"]
    with run.compress(method, **options):
        for step in range(case["steps"] + 1):
            run.feed(0, prompt) if step == 0 else run.feed(prompt + step - 1, prompt + step)
            assert run.kept().equal(tensors[f"kept_{step:02d}"])
            score = run.store.books["score"][0]
            torch.testing.assert_close(score, tensors[f"score_{step:02d}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", of("h2o", where=lambda c: c["variant"] == "real_drop"))
def test_h2o_real_drop(path):
    case, tensors = load(path)
    check_rows(case, tensors, "h2o", heavy=case["hh_size"], recent=case["recent_size"])


@pytest.mark.parametrize("path", of("h2o", where=lambda c: c["variant"] == "mask_simulation"))
@torch.no_grad()
def test_h2o_mask_simulation(path):
    case, tensors = load(path)
    run = Scripted(*(tensors[name] for name in "qkv"))
    with run.compress("h2o", heavy=case["heavy_ratio"], recent=case["recent_ratio"], masked=True):
        check_masks(run, case, tensors)


def check_masks(run: Scripted, case, tensors, tolerance=1e-4):
    prompt = case["prompt"]
    for step in range(case["steps"] + 1):
        out = run.feed(0, prompt) if step == 0 else run.feed(prompt + step - 1, prompt + step)
        torch.testing.assert_close(out[:, :, -1], tensors[f"out_{step:02d}"], atol=1e-4, rtol=1e-4)
        score = run.store.books["score"]
        torch.testing.assert_close(score[0], tensors[f"score_{step:02d}"], atol=tolerance, rtol=1e-4)
        hidden = run.store.hidden
        visible = torch.ones_like(score[0], dtype=torch.bool) if hidden is None else ~hidden.expand_as(score)[0]
        # the last column is the next token itself
        assert visible.equal(tensors[f"mask_next_{step:02d}"][:, :-1])
        assert tensors[f"mask_next_{step:02d}"][:, -1].ne(run.store.blind).all()
    assert run.store.stored == prompt + case["steps"]


@pytest.mark.parametrize("path", of("h2o", where=lambda c: c["variant"] == "local_heavy_hitter_mask"))
@torch.no_grad()
def test_h2o_step_wise_mask(path):
    """The helper's masks are H2O without a window; its rows are softmaxes over all tokens, which the test hands in."""
    case, tensors = load(path)
    logits, mask, budget = tensors["logits"][0], tensors["mask"][0], case["heavy_budget"]
    causal = torch.ones_like(mask[0]).tril()
    rows = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    score, alive = rows[:, :budget].sum(1), torch.arange(logits.shape[-1]) < budget
    held = alive.nonzero()[:, 0].expand(len(rows), -1)
    held_score = score[:, :budget]
    for token in range(budget, logits.shape[-1]):
        keep, _ = retain(held_score[None], None, budget - 1, 0, width=budget - 1)
        held, held_score = held.gather(1, keep[0]), held_score.gather(1, keep[0])
        held = torch.cat([held, torch.full((len(held), 1), token)], dim=1)
        assert torch.zeros_like(mask[:, token]).scatter(1, held, True).equal(mask[:, token])
        held_score = torch.cat([held_score, torch.zeros(len(held), 1)], dim=1) + rows[:, token].gather(1, held)


@pytest.mark.parametrize("path", of("a2sf", where=lambda c: "base_mask" in c["source"]))
@torch.no_grad()
def test_a2sf_masks(path):
    case, tensors = load(path)
    logits, mask = tensors["logits"][0], tensors["mask"][0]
    budget = case["streaming"] + case["selecting"] + case["recent"]
    n = logits.shape[-1]
    run = from_rows([logits[:, q].clamp_min(-1e4) for q in range(n)])
    method = A2SF(case["alpha"], budget=budget, recent=case["recent"], sinks=case["streaming"])
    with run.compress(method):
        run.feed(0, budget)
        for token in range(budget, n):
            row = torch.zeros_like(mask[:, token]).scatter(1, run.kept(), True)
            row[:, token] = True
            assert row.equal(mask[:, token])
            run.feed(token, token + 1)


@pytest.mark.parametrize("path", of("a2sf", where=lambda c: "ours" in c["source"]))
def test_a2sf_real_eviction(path):
    case, tensors = load(path)
    check_rows(case, tensors, "a2sf", alpha=case["alpha"], budget=case["budget"], recent=case["recent"])


@pytest.mark.parametrize("path", of("a2sf", where=lambda c: "prefill only" in c["source"] and "forgetting_factor" in c))
@torch.no_grad()
def test_a2sf_prefill_only(path):
    case, tensors = load(path)
    q, k, v = (tensors[name] for name in "qkv")
    run = Scripted(q, k, v)
    method = A2SF(case["forgetting_factor"], budget=case["total_budget"], recent=case["recent_budget"], decode=False)
    with run.compress(method):
        out = run.feed(0, q.shape[2])
    torch.testing.assert_close(out, tensors["out"], atol=1e-5, rtol=1e-4)
    picked = k.gather(2, tensors["selected"][..., None].expand(-1, -1, -1, k.shape[-1]))
    torch.testing.assert_close(run.store.keys, picked, atol=1e-6, rtol=0)


@dataclass(frozen=True)
class Noisy(Keyformer):
    """Keyformer with the noise of a case."""

    tensors: dict = field(default_factory=dict)

    def draw(self, layer, rows, seen):
        noise = self.tensors[f"gumbel_{layer.memory['call']:02d}"]
        return noise[:, :, rows[0], :seen] if noise.shape[2] > 1 else noise

    def accumulate(self, layer, score):
        layer.memory["call"] = layer.memory.get("call", -1) + 1
        return super().accumulate(layer, score)

    def options(self):
        return {}


def noisy(case, tensors, **options) -> Noisy:
    start, delta = case["tau_init"], case["tau_delta"]
    return Noisy(
        budget=case["kv_cache_percent"] / 100, recent=case["recent_percent"] / 100, tau_start=start,
        tau_end=start + 100 * delta, horizon=100, tensors=tensors, **options,
    )  # fmt: skip


@pytest.mark.parametrize("path", cases("keyformer"))
@torch.no_grad()
def test_keyformer_as_released(path):
    case, tensors = load(path)
    run = Scripted(*(tensors[name] for name in "qkv"))
    with run.compress(noisy(case, tensors, official_quirks=True)):
        check_masks(run, case, tensors)


@pytest.mark.parametrize("path", of("keyformer", where=lambda c: c["batch"] == 1))
@torch.no_grad()
def test_keyformer_prompt(path):
    """The paper's policy agrees with the code on the prompt's scores and key tokens."""
    case, tensors = load(path)
    k = tensors["k"]
    run = Scripted(tensors["q"], k, tensors["v"])
    prompt, recent, key = case["prompt"], case["recent_tokens"], case["key_tokens"]
    with run.compress(noisy(case, tensors)):
        run.feed(0, prompt)
    whole = tensors["score_00"]
    if recent:  # the code has already zeroed the scores of what it hides
        whole = whole.masked_fill(whole == 0, -1.0)
    best = whole[:, : prompt - recent].topk(key).indices.sort().values
    last = torch.arange(prompt - recent, prompt).expand(len(best), -1)
    expected = torch.cat([best, last], dim=1)
    torch.testing.assert_close(run.store.keys[0], k[0].gather(1, expected[..., None].expand(-1, -1, k.shape[-1])))


@dataclass(frozen=True)
class Watched(LazyEviction):
    """LazyEviction that leaves what it knew before it evicted."""

    seen: list = field(default_factory=list)

    def cache(self, layer, state):
        eviction = super().cache(layer, state)
        self.seen.append(layer.books)
        return eviction

    def options(self):
        return {}


@pytest.mark.parametrize("path", cases("lazyeviction"))
@torch.no_grad()
def test_lazyeviction(path):
    case, tensors = load(path)
    prompt, k = case["prompt"], tensors["k"]
    q = torch.cat([torch.zeros_like(k[:, :, :prompt]), tensors["q"]], dim=2)
    run = Scripted(q, k, k)
    method = Watched(budget=case["budget_B"], window=case["window_W"], alpha=case["alpha"])
    held = torch.arange(prompt).expand(k.shape[1], -1)
    with run.compress(method):
        run.feed(0, prompt)
        for step in range(1, case["steps"] + 1):
            new = prompt + step - 1
            run.feed(new, new + 1)
            kept, order = tensors[f"kept_{step:02d}"].sort()
            before = torch.cat([held, torch.full_like(held[:, :1], new)], dim=1)
            places = torch.searchsorted(before, kept)
            known = method.seen[-1]
            for name, book in (("ts", "last"), ("mri", "longest")):
                mine = known[book][0].gather(1, places)
                assert mine.equal(tensors[f"{name}_{step:02d}"].gather(1, order).int())
            assert run.store.stored == kept.shape[1]
            if kept.shape[1] < before.shape[1]:
                score = recurrence(known["last"], known["longest"], step)[0]
                mine = (run.store.keys[0][:, :, None] - k[0].gather(1, spread(before, k))[:, None]).abs().sum(-1) < 1e-5
                mine = mine.any(1)
                torch.testing.assert_close(
                    score[mine].view(len(score), -1).sort().values, score.gather(1, places).sort().values
                )
                # of equal scores the code keeps any, so go on from its choice
                run.store.keys = run.store.values = k.gather(2, spread(kept, k)[None])
                run.store.books = {name: book.gather(2, places[None]) for name, book in known.items()}
            held = kept


def spread(index, k):
    return index[..., None].expand(-1, -1, k.shape[-1])


def turn(x, positions, base=10000.0):
    """Rotary embedding of ``x`` [1, H, n, d] at ``positions`` [1, n]."""
    rates = base ** -(torch.arange(0, x.shape[-1], 2).float() / x.shape[-1])
    angle = (positions[..., None] * rates).repeat(1, 1, 2)
    return rotate(x, angle.cos(), angle.sin())


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("path", of("tokenselect", where=lambda c: "theta" not in c))
@torch.no_grad()
def test_tokenselect(path, official):
    case, tensors = load(path)
    q, k = tensors["q"].transpose(0, 1)[None], tensors["k"].transpose(0, 1)[None]
    n, chunk = case["N"], case["chunk"]
    run = Scripted(torch.cat([q.new_zeros(1, q.shape[1], n - chunk, q.shape[3]), q], dim=2), k, k)
    method = TokenSelect(case["top_k"], case["n_init"], case["n_local"], reuse=None, official_heads=official)
    seen = []
    run.layer.self_attn.register_forward_pre_hook(lambda m, args: seen.append(run.store.selected))
    kind = "mod" if official else "group"
    with run.compress(method):
        run.feed(0, n - chunk)
        assert seen[-1] is None
        run.feed(n - chunk, n)
    everything = torch.arange(n)
    found = everything if seen[-1] is None else torch.cat([seen[-1][0, 0], everything[n - chunk :]])
    assert found.equal(tensors.get(f"idx_{kind}_fp32", tensors.get(f"idx_{kind}", everything)))
    if seen[-1] is not None:
        mean = turn(q, torch.arange(case["n_local"], case["n_local"] + chunk)[None]).mean(2)
        middle = (everything >= case["n_init"]) & (everything < n - case["n_local"])
        votes = soft_votes(mean, k, middle[None], modulo=official)[0, middle]
        torch.testing.assert_close(votes, tensors[f"vote_{kind}_fp32"].flatten(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("path", of("tokenselect", where=lambda c: "theta" in c))
def test_tokenselect_reuses_choices(path):
    """A fixed key set, which no growing cache has, so the method is asked directly."""
    case, tensors = load(path)
    k, books, memory = tensors["k"].transpose(0, 1)[None], {}, {}
    method = TokenSelect(case["top_k"], case["n_init"], case["n_local"], reuse=case["theta"], vote="rotated")
    n = k.shape[2] - 1
    for q, hit, top in zip(tensors["q"], tensors["hit"], tensors["top"], strict=True):
        before = memory.get("query")
        turned = turn(q[None, :, None], torch.tensor([[case["n_local"]]]))
        view = AttendLayer(0, 1, k[:, :, :n], None, 1, None, books, memory, lambda _, turned=turned: turned)
        keep = method.attend(view, {})[0, 0]
        assert (memory["query"] is before) == bool(hit)
        middle = (keep >= case["n_init"]) & (keep < n + 1 - case["n_local"])
        assert keep[middle].equal(top.sort().values)
