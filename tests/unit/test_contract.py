# SPDX-License-Identifier: Apache-2.0
"""What other programs rely on: compiled models, copies, configurations, methods of other packages, wrong types."""

import copy
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models_tiles import FAMILIES, one_row
from models_tiles import prompts as prompts_tiles

import vlmcompress
import vlmcompress.compat
import vlmcompress.flex
from vlmcompress import Method, Stage
from vlmcompress.attach import current_handle

N = 36
ENTRY = {"methods": [{"method": "grid", "options": {"keep": 4}}], "positions": "published"}


# torch.compile --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "options"), [("grid", {"keep": 4}), ("fastv", {"keep": 4, "layer": 1})])
@torch.no_grad()
def test_a_model_that_was_compiled_and_run_before(model, inputs, name, options):
    stock = model(**inputs).logits
    with vlmcompress.compress(model, name, **options):
        expected = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs)
    with vlmcompress.compress(compiled, name, **options) as handle:
        torch.testing.assert_close(compiled(**inputs).logits, expected, atol=1e-5, rtol=1e-5)
        assert handle.last.layer_tokens[-1] == 8
    torch.testing.assert_close(compiled(**inputs).logits, stock, atol=1e-5, rtol=1e-5)


# copies ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copies_are_refused_while_compressed(model, take):
    with vlmcompress.compress(model, "grid", keep=4), pytest.raises(ValueError, match="cannot be copied or pickled"):
        take(model)
    take(model)


@torch.no_grad()
def test_replicas_are_refused(model, inputs):
    with vlmcompress.compress(model, "grid", keep=4):
        replica = model._replicate_for_data_parallel()  # what torch.nn.DataParallel runs on every GPU
        with pytest.raises(ValueError, match="copy of the compressed model"):
            replica(**inputs)
        model(**inputs)


# configurations -------------------------------------------------------------------------------------------------
def test_an_entry_that_was_there_comes_back(model):
    model.config.vlmcompress = ENTRY
    with vlmcompress.compress(model, "vtc-cls", keep=4):
        assert model.config.vlmcompress["methods"][0]["method"] == "vtc-cls"
    assert model.config.vlmcompress == ENTRY


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_may_share_one_configuration(model, order):
    other = type(model)(model.config)
    handles = [vlmcompress.compress(model, "grid", keep=4), vlmcompress.compress(other, "pool", keep=4)]
    for place in order:
        handles[place].remove()
    assert not hasattr(model.config, "vlmcompress")


@pytest.mark.parametrize("entry", [{"method": "grid", "keep": 4}, "grid", {**ENTRY, "methods": [{}]}, [3]])
def test_an_entry_of_another_form_is_refused(model, entry):
    model.config.vlmcompress = entry
    with pytest.raises(ValueError, match="was not written by save_pretrained"):
        vlmcompress.restore(model)
    assert model.config.vlmcompress == entry


def test_a_method_that_refuses_late_replaces_nothing(model):
    @dataclass(frozen=True)
    class Late(Method):
        stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

        def equip(self, adapter):
            raise ValueError("There are no weights for this model.")

    handle = vlmcompress.compress(model, "grid", keep=4)
    with pytest.raises(ValueError, match="no weights"):
        vlmcompress.compress(model, Late(), replace=True)
    assert current_handle(model) is handle
    handle.remove()


@torch.no_grad()
def test_removal_puts_back_what_others_had_put_on_the_object():
    family = FAMILIES["internvl"]
    model = family.build()
    vlmcompress.flex.install(model, counts=(4, 9))
    own = model.generate
    model.model.get_image_features = features = model.model.get_image_features
    with vlmcompress.compress(model, "tokenflex", keep=4):
        assert model.generate != own
    assert model.generate == own
    assert model.model.get_image_features is features
    spec = [[5, (0, 0), 7]]
    model.generate(**one_row(prompts_tiles(family, model, spec), spec, 0), max_new_tokens=2)


# calls -----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_mask_that_is_too_short(model, inputs):
    with vlmcompress.compress(model, "grid", keep=4), pytest.raises(ValueError, match="covers 39 of the 48 tokens"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :39]})


@torch.no_grad()
def test_attention_that_is_changed_later(model, inputs):
    with vlmcompress.compress(model, "fastv", keep=4, layer=1) as handle:
        model.set_attn_implementation("eager")
        model(**inputs)
        assert handle.last.layer_tokens == [2 * N, 8, 8, 8]
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="flex attention cannot take"):
            model(**inputs)


# training -------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(vlmcompress.compat.REPLAYS_HOOKS, reason="refused there")
def test_watched_layers_can_be_checkpointed(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()
    model.gradient_checkpointing_enable()
    with vlmcompress.compress(model, "transprune", layers=(1, 2), fractions=(0.6, 0.3)) as handle:
        model(**inputs, labels=labels).loss.backward()
        assert handle.last.layer_tokens[-1] < 2 * N
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "options"), [("grid", {"keep": 4}), ("fastv", {"keep": 4, "layer": 1}), ("none", {})])
@torch.no_grad()
def test_the_number_of_labels_that_a_trainer_counts(model, inputs, name, options):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 0] = -100  # no position predicts it
    counted = (labels != -100).sum()
    with vlmcompress.compress(model, name, **options):
        mean = model(**inputs, labels=labels).loss
        for items in (counted, int(counted), 2 * counted):  # the last one: two batches make a step
            share = model(**inputs, labels=labels, num_items_in_batch=items).loss
            torch.testing.assert_close(share, mean * counted / items)
    assert counted == (labels != -100).sum()


def _gradients(model, inputs, name: str, options: dict) -> list[torch.Tensor]:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.zero_grad()
    with vlmcompress.compress(model, name, **options):
        model(**inputs, labels=labels).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["grid", "pool", "vtc-cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_a_number(family, name):
    family = FAMILIES[family]
    model = family.build().train()
    inputs = prompts_tiles(family, model, [[5, (1, 2) if family.tiled else (0, 0), 7]])
    assert all(gradient.isfinite().all() for gradient in _gradients(model, inputs, name, {"keep": 0.3}))


@pytest.mark.skipif(vlmcompress.compat.REPLAYS_HOOKS, reason="refused there")
@pytest.mark.parametrize(("name", "options"), [("grid", {"keep": 4}), ("fastv", {"keep": 4, "layer": 1})])
def test_checkpointing_where_the_model_makes_its_cache_ahead(name, options):
    family = FAMILIES["smolvlm"]
    model = family.build().train()
    inputs = prompts_tiles(family, model, [[5, (1, 2), 7], [4, (0, 0), 3]])
    plain = _gradients(model, inputs, name, options)
    model.gradient_checkpointing_enable()
    for one, other in zip(plain, _gradients(model, inputs, name, options), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(vlmcompress.compat.REPLAYS_HOOKS, reason="refused with another sentence there")
def test_masks_inside_checkpointed_tower_layers_are_refused():
    family = FAMILIES["internvl"]
    model = family.build().train()
    inputs = prompts_tiles(family, model, [[5, (1, 2), 7]])
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="freeze the tower"):
        _gradients(model, inputs, "tome", {"keep": 4})
    model.model.vision_tower.eval()
    assert _gradients(model, inputs, "tome", {"keep": 4})


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("internvl", "todre", {"keep": 0.3, "pivot": "center"}),
        ("internvl", "globalcom2", {"keep": 0.3}),
        ("internvl", "tokenselect", {"select": 8, "sinks": 2, "local": 4}),
    ],
)
@torch.no_grad()
def test_mixed_precision(family, name, options):
    family = FAMILIES[family]
    model = family.build()
    inputs = prompts_tiles(family, model, [[5, (2, 2), 7], [4, (1, 2), 3]])
    with vlmcompress.compress(model, name, **options), torch.autocast("cpu", torch.bfloat16):
        assert model(**inputs).logits.isfinite().all()
        assert model.generate(**inputs, max_new_tokens=3).shape[0] == 2


@torch.no_grad()
def test_a_method_computes_in_its_own_precision_under_autocast(model, inputs):
    found: dict[str, set[torch.dtype]] = {}

    def note(hook: str, view, scores: torch.Tensor | None = None) -> None:
        one = torch.ones(3, 3)
        found.setdefault(hook, set()).update({(one @ one).dtype, torch.float32 if scores is None else scores.dtype})

    @dataclass(frozen=True)
    class Probe(Method):
        stages: ClassVar[frozenset[Stage]] = frozenset(Stage)

        def tower_layers(self, adapter):
            return [1]

        def cut_layers(self, adapter):
            return [1]

        def watch_layers(self, adapter):
            return [0]

        def tower(self, layer, state):
            note("tower", layer, layer.q)

        def entry(self, tokens, state):
            note("entry", tokens)
            assert tokens.projected.isfinite().all()

        def watch(self, layer, part, inputs, outputs, state):
            note("watch", None)

        def prefill(self, layer, state):
            note("prefill", layer, layer.attention(layer.frame.last[:, None], following=True))
            assert layer.values().isfinite().all()

        def cache(self, layer, state):
            note("cache", layer)

        def attend(self, layer, state):
            note("attend", layer)

        def settle(self, layer, state):
            note("settle", layer)

    with vlmcompress.compress(model, Probe()), torch.autocast("cpu", torch.bfloat16):
        model.generate(**inputs, max_new_tokens=3)
        one = torch.ones(3, 3)
        assert (one @ one).dtype == torch.bfloat16
    half = found.pop("tower")  # what the layer itself made stays as it is
    assert half == {torch.float32, torch.bfloat16}
    assert set(found) == {"entry", "watch", "prefill", "cache", "attend", "settle"}
    assert all(types == {torch.float32} for types in found.values())
