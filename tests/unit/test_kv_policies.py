# SPDX-License-Identifier: Apache-2.0
"""Cache policies inside real models: batches, beams, later turns, M-RoPE, tiles; what leaves and what is reported."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, cached, prompts, row_alone, tiny_llava
from models_next import one_row, prompts_next, tiny_next
from models_qwen import prompts_qwen, row_of, tiny_qwen
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

import vlmcompress
from vlmcompress.methods.h2o import H2O
from vlmcompress.methods.keyformer import Keyformer
from vlmcompress.methods.vtc_cls import VtcCls
from vlmcompress.ops.kv import coarse, gumbel, retain

N = 36
GREEDY = dict(max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE], return_dict_in_generate=True)
EVICTING = [
    ("h2o", {"heavy": 0.2, "recent": 0.1}),
    ("h2o", {"heavy": 12, "recent": 4, "visual_share": 0.25}),
    ("a2sf", {"budget": 0.4, "recent": 2, "sinks": 1}),
    ("a2sf", {"budget": 14, "decode": False}),
    ("keyformer", {"budget": 0.5}),
    ("lazyeviction", {"budget": 24, "window": 3, "alpha": 0.03}),
]
ALL = [*EVICTING, ("tokenselect", {"select": 9, "sinks": 2, "local": 5, "reuse": 0.5}),
       ("tokenselect", {"select": 9, "sinks": 2, "local": 5, "reuse": None, "vote": "rotated"})]  # fmt: skip
SPEC = [[5, "image", 7], [2, "image", 3], [9, "image", 12]]


def same_alone(model, inputs, rows, name, options, **greedy):
    """Logits of every step are those of the rows alone; returns the cache of the batch."""
    greedy = {**GREEDY, **greedy, "output_logits": True}
    with vlmcompress.compress(model, name, **options):
        batch = model.generate(**inputs, **greedy)
        for number, row in enumerate(rows):
            alone = model.generate(**row, **greedy)
            for both, one in zip(batch.logits, alone.logits, strict=True):
                torch.testing.assert_close(both[number], one[0], atol=1e-4, rtol=1e-4)
    return batch.past_key_values


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "options"), ALL)
@torch.no_grad()
def test_a_row_alone_is_as_in_the_batch(name, options, attention):
    inputs = prompts(SPEC, N)
    model = tiny_llava(attention=attention, eos_token_id=None)
    cache = same_alone(model, inputs, [row_alone(inputs, SPEC, r) for r in range(3)], name, options)
    whole = inputs["input_ids"].shape[1] + 5
    assert cache.get_seq_length() == whole
    assert all((layer.keys.shape[2] < whole) == (name != "tokenselect") for layer in cache.layers)


@pytest.mark.parametrize(("name", "options"), ALL)
@torch.no_grad()
def test_tiles_and_mrope(name, options):
    model = tiny_next(eos_token_id=None)
    inputs = prompts_next(model, [[5, "square", 7], [2, "wide", 3]])
    rows = [one_row(inputs, row, slice(row, row + 1)) for row in range(2)]
    same_alone(model, inputs, rows, name, options, max_new_tokens=4)
    inputs = prompts_qwen([[5, (4, 6), 7], [2, (6, 6), 3]])
    same_alone(tiny_qwen(), inputs, [row_of(inputs, row) for row in range(2)], name, options, suppress_tokens=[90, 91])


@pytest.mark.parametrize(("name", "options"), ALL)
@torch.no_grad()
def test_beams_and_second_turn(name, options):
    """A second turn goes on from what the first one left, however it is handed in."""
    model = tiny_llava(eos_token_id=None)
    inputs = prompts(SPEC[:2], N)
    with vlmcompress.compress(model, name, **options):
        beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 1}
        batch = model.generate(**inputs, **beams).sequences
        for number in range(2):
            row = row_alone(inputs, SPEC, number)
            assert model.generate(**row, **beams).sequences[0, -6:].equal(batch[number, -6:])

        first = model.generate(**inputs, **GREEDY)
        turn = torch.randint(4, 90, (2, 4), generator=torch.Generator().manual_seed(3))
        full = torch.cat([first.sequences, turn], 1)
        grown = full.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, grown, dtype=torch.long)], 1)
        again = model.generate(input_ids=full, attention_mask=mask, **cached(first), **GREEDY)
        assert again.past_key_values.get_seq_length() == full.shape[1] + 5
        with pytest.raises(ValueError, match="Assisted decoding"):
            again.past_key_values.crop(-1)


@torch.no_grad()
def test_steps_see_what_stayed():
    """Against the model without compression: a mask hides what the policy has evicted, per layer and head."""
    model = tiny_llava(attention="eager", eos_token_id=None)
    inputs = prompts([[5, "image", 7]], N)
    width = inputs["input_ids"].shape[1]
    tokens = torch.randint(4, 90, (1, 5), generator=torch.Generator().manual_seed(0))
    text = model.model.language_model
    born = []  # per step and layer: [H_kv, n] columns that a query behind the step can see

    class Numbered(H2O):
        def cache(self, layer, state):
            numbers = layer.books.get("number", torch.zeros(1, 2, layer.keys.shape[2], dtype=torch.long))
            start = layer.memory.get("seen", 0)
            layer.memory["seen"] = start + layer.new
            numbers[..., -layer.new :] = torch.arange(start, start + layer.new)
            layer.books["number"] = numbers
            born.append((layer.index, numbers[0].clone()))
            return super().cache(layer, state)

    embeds = model.get_input_embeddings()(torch.cat([inputs["input_ids"], tokens], 1))
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds[0, :width][inputs["input_ids"][0] == IMAGE] = features
    with vlmcompress.compress(model, Numbered(heavy=6, recent=4)):
        out = model(**inputs, use_cache=True)
        logits, cache = [], out.past_key_values
        for token in tokens[0]:
            out = model(input_ids=token.view(1, 1), cache=cache, use_cache=True)
            logits.append(out.logits[0, -1])
    steps = torch.arange(width + 5)
    causal = (steps <= steps[:, None]).expand(4, 4, -1, -1).clone()  # [layer, head, query, key]
    for number, (layer, seen) in enumerate(born):
        query = width - 1 + number // 4
        if query >= width:
            allowed = torch.zeros(2, width + 5, dtype=torch.bool).scatter(1, seen, True)
            causal[layer, :, query] &= allowed.repeat_interleave(2, dim=0)
    hidden, positions = embeds, steps[None]
    for layer, mask in zip(text.layers, causal, strict=True):
        additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[None]
        hidden = layer(hidden, attention_mask=additive, position_embeddings=text.rotary_emb(hidden, positions))
    expected = model.lm_head(text.norm(hidden))[0, width:]
    torch.testing.assert_close(torch.stack(logits), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {"heavy": 500, "recent": 1}),
        ("a2sf", {"budget": 1.0, "decode": False}),
        ("keyformer", {"budget": 500}),
        ("lazyeviction", {"window": 101}),
        ("tokenselect", {}),
    ],
)
@torch.no_grad()
def test_room_for_everything_changes_nothing(name, options):
    model, inputs = tiny_llava(eos_token_id=None), prompts(SPEC, N)
    before = model.generate(**inputs, **GREEDY, output_logits=True)
    with vlmcompress.compress(model, name, **options):
        after = model.generate(**inputs, **GREEDY, output_logits=True)
    assert all(a.equal(b) for a, b in zip(before.logits, after.logits, strict=True))


@torch.no_grad()
def test_identities():
    model, inputs = tiny_llava(eos_token_id=None), prompts(SPEC, N)

    def run(name, **options):
        with vlmcompress.compress(model, name, **options):
            return torch.stack(model.generate(**inputs, **GREEDY, output_logits=True).logits)

    h2o = run("h2o", heavy=10, recent=5)
    assert run("a2sf", alpha=1.0, budget=15, recent=5).equal(h2o)
    assert run("keyformer", budget=15, recent=5, noise=False, tau_end=1.0).equal(h2o)
    assert not run("keyformer", budget=15, recent=5).equal(h2o)
    assert not run("keyformer", budget=15, recent=5, seed=1).equal(run("keyformer", budget=15, recent=5))


@torch.no_grad()
def test_modality_is_reported_and_budgeted():
    model, inputs = tiny_llava(eos_token_id=None), prompts(SPEC, N)
    for share in (0.25, None, 1.0):
        with vlmcompress.compress(model, "h2o", heavy=12, recent=4, visual_share=share) as handle:
            out = model.generate(**inputs, **GREEDY)
            report = handle.report()
            assert report.kv_visual + report.kv_text == pytest.approx(3 * 16)
            assert report.kv_bytes == 3 * 16 * 4 * 2 * 2 * 16 * 4  # rows, entries, layers, K and V, heads, width, bytes
            assert "cache entries of visual tokens" in str(report)
            now = handle.cache_entries(out.past_key_values)
            assert len(now) == 4 and all(visual + text == pytest.approx(3 * 16) for visual, text in now)
            if share == 0.25:  # row 1 has 5 text tokens, 4 of them in the window, so that its image takes the rest
                assert report.kv_visual == pytest.approx(sum(real_split(t, 3, 9) for t in (8, 1, 17)))
    with pytest.raises(ValueError, match="has worked on"):
        handle.cache_entries(DynamicCache())


def real_split(text: int, wanted: int, others: int) -> int:
    """Visual entries when ``text`` entries compete for ``others`` places and images for ``wanted``."""
    return wanted + max(0, others - text)


@torch.no_grad()
def test_composed_with_other_stages():
    model, inputs = tiny_llava(eos_token_id=None), prompts(SPEC, N)
    methods = vlmcompress.methods()
    for before in (VtcCls(keep=9), methods["fastv"](keep=9)):
        with vlmcompress.compress(model, before + H2O(heavy=6, recent=4)) as handle:
            out = model.generate(**inputs, **GREEDY)
            assert all(layer.keys.shape[2] == 10 for layer in out.past_key_values.layers)
            assert handle.last.layer_tokens[-1] == 3 * 9
            for row in range(3):
                alone = model.generate(**row_alone(inputs, SPEC, row), **GREEDY).sequences
                assert alone[0, -6:].equal(out.sequences[row, -6:])


@torch.no_grad()
def scores_of_a_step(model) -> list[torch.Tensor]:
    """H2O's scores in every layer behind a prompt and one more token."""
    cache = model(**prompts(SPEC, N), use_cache=True).past_key_values
    model(input_ids=torch.tensor([[5], [6], [7]]), past_key_values=cache)
    return [layer.books["score"] for layer in cache.layers]


def compressed_scores(model) -> list[torch.Tensor]:
    with vlmcompress.compress(model, "h2o"):
        return scores_of_a_step(model)


def test_a_decoded_token_is_projected_once():
    model, calls = tiny_llava(), []
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: calls.append(output.shape[1]))
    compressed_scores(model)
    assert calls.count(1) == len(model.model.language_model.layers)


def test_an_adapter_put_on_later_asks_its_own_queries():
    model = tiny_llava()
    stock = compressed_scores(model)
    with vlmcompress.compress(model, "h2o"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
        late = scores_of_a_step(model)
    for before, after, without in zip(late, compressed_scores(model), stock, strict=True):
        assert before.equal(after) and not torch.allclose(before, without, atol=1e-3)


def test_no_map_of_the_prompt_is_formed():
    """The largest tensor while scores are summed is a chunk of rows, not heads × N × N."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.most = max(self.most, out.numel())
            return out

    from vlmcompress.views import CacheLayer

    model = tiny_llava(eos_token_id=None)
    inputs, chunks = prompts([[5, "image", 900]], N), CacheLayer.chunks
    try:
        CacheLayer.chunks = lambda self: chunks(self, 2**18)
        for method in (H2O(), Keyformer()):
            with torch.no_grad(), vlmcompress.compress(model, method), Largest() as seen:
                model.model(**inputs, use_cache=True)
            assert seen.most < 4 * 941 * 941 // 4
    finally:
        CacheLayer.chunks = chunks


def test_retain_by_hand():
    scores = torch.tensor([[[5.0, 1.0, 4.0, 4.0, 2.0, 0.0]]])
    keep, real = retain(scores, None, 2, 1, 1, width=4)
    assert keep.tolist() == [[[0, 2, 3, 5]]] and real is None
    keep, _ = retain(scores, None, 4, 1, width=5)
    assert keep.tolist() == [[[0, 2, 3, 4, 5]]]
    tied = torch.tensor([[[1.0, 1.0, 1.0, 9.0]]])
    assert retain(tied, None, 2, 1, width=3)[0].tolist() == [[[0, 1, 3]]]
    valid = torch.tensor([[[False, True, True, True, True, True]]])
    keep, real = retain(scores, valid, torch.tensor([1]), torch.tensor([1]), width=4)
    assert keep[real].tolist() == [2, 5] and real.tolist() == [[[False, False, True, True]]]
    visual = torch.tensor([[[True, True, True, False, False, False]]])
    keep, _ = retain(scores, None, 2, 1, width=3, visual=visual, visual_share=0.5)
    assert keep.tolist() == [[[0, 3, 5]]]
    keep, _ = retain(scores, None, 3, 1, width=4, visual=visual, visual_share=0.0)
    assert keep.tolist() == [[[0, 3, 4, 5]]]


def test_noise_is_gumbel():
    noise = gumbel(3, torch.arange(8).view(8, 1, 1), torch.arange(200).view(1, 200, 1), torch.arange(300))
    assert noise.mean() == pytest.approx(0.5772, abs=0.01) and noise.std() == pytest.approx(1.2825, abs=0.01)
    flat = noise.flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.02
    assert torch.corrcoef(noise[0])[0, 1:].abs().mean() < 0.06
    assert gumbel(3, torch.tensor([[5]]), torch.tensor([[7]]), torch.tensor([11])).item() == noise[5, 7, 11]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("h2o", {"heavy": 1.5}, "up to 1"),
        ("h2o", {"heavy": 0, "recent": 0}, "cannot both be 0"),
        ("h2o", {"visual_share": 0.5, "masked": True}, "no visual_share"),
        ("h2o", {"visual_share": 2}, "between 0 and 1"),
        ("a2sf", {"alpha": 1.1}, "from 0 to 1"),
        ("a2sf", {"budget": 3, "recent": 4}, "more than the budget"),
        ("a2sf", {"budget": 0}, "at least 1"),
        ("keyformer", {"budget": 4, "recent": 5}, "more than the budget"),
        ("keyformer", {"tau_end": 0}, "above 0"),
        ("keyformer", {"horizon": 0}, "at least 1"),
        ("lazyeviction", {"budget": 3, "window": 4}, "more than the budget"),
        ("lazyeviction", {"alpha": -1}, "from 0 to 1"),
        ("lazyeviction", {"formula": "x"}, "'code' or 'paper'"),
        ("tokenselect", {"local": 0}, "at least 1"),
        ("tokenselect", {"reuse": 2}, "cosine"),
        ("tokenselect", {"vote": "x"}, "rotated"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        vlmcompress.compress(tiny_llava(), name, **options)


def test_votes_that_only_rounding_tells_apart_tie():
    """Tokens that repeat have equal keys, and a product of another shape rounds otherwise."""
    votes = coarse(torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.01)
    for off in (-(2**-20), 2**-22, 2**-20):
        assert coarse(votes * (1 + off)).equal(votes)
    assert coarse(votes * (1 + 2**-12)).ne(votes).all()
