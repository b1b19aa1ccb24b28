# SPDX-License-Identifier: Apache-2.0
"""Living with a compressed model: training, precision, threads, saving, other caches, removal, bad input."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from models import IMAGE, prompts, tiny_llava
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import vlmcompress
from vlmcompress.compat import REPLAYS_HOOKS

N = 36
GREEDY = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE])
METHODS = [("vtc-cls", {"keep": 9}), ("tower-cls", {"keep": 9}), ("fastv", {"keep": 9}), ("keep-last", {"budget": 20})]


def trace(model):
    """Everything that removal has to put back."""
    hooks = {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), type(m), tuple(m.__dict__))
        for name, m in model.named_modules()
    }
    return hooks, copy.deepcopy(model.config), model.config._attn_implementation


@pytest.mark.parametrize(("name", "options"), METHODS)
@torch.no_grad()
def test_removal_leaves_no_trace(model, inputs, name, options):
    answer, logits = model.generate(**inputs, **GREEDY), model(**inputs).logits
    before = trace(model)
    handle = vlmcompress.compress(model, name, **options)
    assert not model.generate(**inputs, **GREEDY).equal(answer) or name == "keep-last"
    handle.remove()
    assert trace(model)[0] == before[0]
    assert trace(model)[1].to_dict() == before[1].to_dict()
    assert trace(model)[2] == before[2]
    assert model(**inputs).logits.equal(logits)
    assert model.generate(**inputs, **GREEDY).equal(answer)
    with pytest.raises(ValueError, match="already been removed"):
        handle.remove()
    # an exception inside leaves the model clean, too
    with pytest.raises(RuntimeError), vlmcompress.compress(model, name, **options):
        model(input_ids=inputs["input_ids"][:, :2], pixel_values=inputs["pixel_values"][:, :1])
    assert trace(model)[0] == before[0]
    assert model(**inputs).logits.equal(logits)


@pytest.mark.parametrize(("name", "options"), METHODS[:3])
def test_loss_gradients_and_labels(model, inputs, name, options):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    untouched = labels.clone()
    model.train()
    with vlmcompress.compress(model, name, **options) as handle:
        output = model(**inputs, labels=labels)
        output.loss.backward()
        images = [s.images[0] for s in handle.last.samples]
    assert labels.equal(untouched)
    assert output.logits.shape[:2] == labels.shape
    for module in (model.model.multi_modal_projector.linear_1, model.model.vision_tower.embeddings.patch_embedding):
        assert module.weight.grad.isfinite().all()
        assert module.weight.grad.abs().sum() > 0
    # the loss is that of the positions whose output exists, predicting what comes next
    kept = torch.ones_like(labels, dtype=torch.bool)
    for row, image in enumerate(images):
        columns = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        gone = torch.ones(N, dtype=torch.bool)
        gone[image.kept_at(3)] = False
        kept[row, columns[gone]] = False
    target = labels.masked_fill(~kept, -100)[:, 1:].masked_fill(~kept[:, :-1], -100)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), target.flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(("name", "options"), METHODS[:3])
def test_gradient_checkpointing_gives_the_same_gradients(model, inputs, name, options):
    labels, grads = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100), []
    model.train()
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with vlmcompress.compress(model, name, **options):
            if checkpointing and REPLAYS_HOOKS:
                with pytest.raises(ValueError, match="replays hooks"):
                    model(**inputs, labels=labels)
                return
            model(**inputs, labels=labels).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("first", ["compress", "lora"])
@pytest.mark.parametrize(("name", "options"), METHODS[:3])
def test_lora_trains(model, inputs, name, options, first):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    if first == "lora":
        wrapped = get_peft_model(model, lora)
        handle = vlmcompress.compress(wrapped, name, **options)
    else:
        handle = vlmcompress.compress(model, name, **options)
        wrapped = get_peft_model(model, lora)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    wrapped(**inputs, labels=labels).loss.backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert handle.last.layer_tokens[-1] == 18
    wrapped.generate(**inputs, **GREEDY)
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), METHODS)
@torch.no_grad()
def test_half_precision(inputs, name, options, dtype):
    model = tiny_llava(eos_token_id=None).to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vlmcompress.compress(model, name, **options) as handle:
        logits = model(**inputs).logits
        new = model.generate(**inputs, **GREEDY)
        scores = handle.last.samples[0].images[0].scores()
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert new.shape[1] == inputs["input_ids"].shape[1] + 5
    assert scores is None or (scores.dtype == torch.float32 and len(scores.unique()) == N)


@torch.no_grad()
def test_two_models_in_two_threads(inputs):
    models = [tiny_llava(seed=s, eos_token_id=None) for s in (0, 1)]
    plans = [("vtc-cls", {"keep": 9}), ("fastv", {"keep": 5})]
    handles = [vlmcompress.compress(m, n, **o) for m, (n, o) in zip(models, plans, strict=True)]
    expected = [m.generate(**inputs, **GREEDY) for m in models]
    results: dict[tuple[int, int], bool] = {}

    def work(which: int, thread: int) -> None:
        with torch.no_grad():
            results[which, thread] = all(
                models[which].generate(**inputs, **GREEDY).equal(expected[which]) for _ in range(3)
            )

    threads = [threading.Thread(target=work, args=(which, t)) for which in (0, 1) for t in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(results.values())
    assert [h.last.layer_tokens for h in handles] == [[18] * 4, [72, 72, 10, 10]]


@torch.no_grad()
def test_sampling_with_several_answers(model, inputs):
    with vlmcompress.compress(model, "vtc-cls", keep=9):
        torch.manual_seed(0)
        out = model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=4)
    assert out.shape == (6, inputs["input_ids"].shape[1] + 4)


@pytest.mark.parametrize(("name", "options"), METHODS)
@torch.no_grad()
def test_save_and_restore(model, inputs, name, options, tmp_path):
    with vlmcompress.compress(model, name, positions="original", **options):
        expected = model.generate(**inputs, **GREEDY)
        model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    handle = vlmcompress.restore(loaded)
    assert handle.positions == "original"
    assert loaded.generate(**inputs, **GREEDY).equal(expected)
    with pytest.raises(ValueError, match="no vlmcompress entry"):
        vlmcompress.restore(model)


@torch.no_grad()
def test_assisted_decoding(model):
    inputs = prompts([[9, "image", 9]], N)
    inputs["input_ids"][0, -9:] = inputs["input_ids"][0, :9]  # something to look up
    with vlmcompress.compress(model, "vtc-cls", keep=9):
        plain = model.generate(**inputs, **GREEDY)
        assert model.generate(**inputs, prompt_lookup_num_tokens=3, **GREEDY).equal(plain)
    for name in ("fastv", "keep-last"):
        with vlmcompress.compress(model, name), pytest.raises(ValueError, match="Assisted decoding"):
            model.generate(**inputs, prompt_lookup_num_tokens=3, **GREEDY)


@pytest.mark.parametrize(("name", "options"), METHODS[::2])
@torch.no_grad()
def test_torch_compile_runs_around_the_hooks(model, inputs, name, options):
    with vlmcompress.compress(model, name, **options):
        expected = model(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_gaps_in_positions_are_not_packed_sequences(model):
    inputs = prompts([[5, "image", 7]], N)
    del inputs["attention_mask"]
    with vlmcompress.compress(model, "vtc-cls", keep=9, positions="original"):
        cached = model(**inputs).logits
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, cached, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_sliding_window_text_model(inputs):
    model = tiny_llava("mistral", sliding_window=64, eos_token_id=None)
    with vlmcompress.compress(model, "vtc-cls", keep=9):
        batch = model.generate(**inputs, **GREEDY)
        n = int(inputs["attention_mask"][1].sum())
        alone = {"input_ids": inputs["input_ids"][1:, -n:], "pixel_values": inputs["pixel_values"][1:]}
        assert model.generate(**alone, **GREEDY)[0, -5:].equal(batch[1, -5:])
    with pytest.raises(ValueError, match="sliding-window"):
        vlmcompress.compress(model, "fastv", keep=9)


@pytest.mark.parametrize("text", ["qwen2", "mistral"])
@torch.no_grad()
def test_other_text_models(inputs, text):
    model = tiny_llava(text, eos_token_id=None)
    for name, options in METHODS:
        with vlmcompress.compress(model, name, **options) as handle:
            assert model.generate(**inputs, **GREEDY).shape[0] == 2
            report = handle.report()
            assert report.kv_bytes < report.kv_bytes_before


BAD = [
    (("nonsense",), {}, "no method 'nonsense'"),
    (("vtc-cls",), {"kep": 3}, "no option 'kep'"),
    (("vtc-cls",), {"keep": 0}, "keeps nothing"),
    (("vtc-cls",), {"keep": -3}, "keeps nothing"),
    (("vtc-cls",), {"keep": 1.5}, "outside"),
    (("vtc-cls",), {"keep": "64"}, "not '64'"),
    (("vtc-cls",), {"keep": True}, "not True"),
    (("vtc-cls",), {"layers": 0}, "at least 1"),
    (("vtc-cls",), {"layers": 2.5}, "at least 1"),
    (("vtc-cls",), {"ensemble": "mean of all"}, "one of sum, max, min"),
    (("vtc-cls",), {"start_layer": 3}, "start_layer 3"),
    (("vtc-cls",), {"positions": "somewhere"}, "positions is one of"),
    (("fastv",), {"layer": 4}, "this language model has 4 layers"),
    (("tower-cls",), {"layer": 9}, "between 0 and"),
    (("keep-last",), {"budget": 0}, "at least 1"),
    ((3,), {}, "not int"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD)
def test_bad_input_is_refused_and_nothing_changes(model, args, kwargs, message):
    before = trace(model)
    with pytest.raises(ValueError, match=message) as caught:
        vlmcompress.compress(model, *args, **kwargs)
    assert str(caught.value).endswith((".", ")."))
    assert trace(model)[0] == before[0]
    assert not hasattr(model.config, "vlmcompress")


def test_wrong_models_are_refused():
    text = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match="text-only"):
        vlmcompress.compress(text, "vtc-cls")
    with pytest.raises(ValueError, match="takes a model of Hugging Face"):
        vlmcompress.compress(torch.nn.Linear(2, 2), "vtc-cls")


def test_compressing_twice(model):
    handle = vlmcompress.compress(model, "grid", keep=4)
    with pytest.raises(ValueError, match="already compressed with 'grid'"):
        vlmcompress.compress(model, "vtc-cls", keep=4)
    second = vlmcompress.compress(model, "vtc-cls", keep=4, replace=True)
    with pytest.raises(ValueError, match="already been removed"):
        handle.remove()
    second.remove()
    with pytest.raises(ValueError, match="No visual token"):
        second.report()


def test_composition(model, inputs):
    methods = vlmcompress.methods()
    composed = methods["vtc-cls"](keep=12) + methods["fastv"](keep=5) + methods["keep-last"](budget=14)
    with torch.no_grad(), vlmcompress.compress(model, composed) as handle:
        model.generate(**inputs, **GREEDY)
        assert handle.last.layer_tokens == [24, 24, 10, 10]
        assert max(handle.last.cache_lengths) <= 14
    with pytest.raises(ValueError, match="both choose tokens before"):
        methods["vtc-cls"]() + methods["grid"]()
    with pytest.raises(ValueError, match="Options"):
        vlmcompress.compress(model, composed, keep=3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["tome", "tower-cls"])
def test_towers_that_feed_several_layers_are_not_changed_behind_the_first(method):
    model = tiny_llava()
    model.config.vision_feature_layer = [0, -2]
    with vlmcompress.compress(model, method, keep=9), pytest.raises(ValueError, match="would not fit"):
        model(**prompts([[5, "image", 7]], 36))
