# SPDX-License-Identifier: Apache-2.0
"""What other programs rely on: compiled models, copies, configurations, methods of other packages, wrong types."""

import copy
import pickle
import sys
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import prompts, tiny_llava
from models_tiles import FAMILIES, one_row
from models_tiles import prompts as prompts_tiles

import vlmcompress
import vlmcompress.compat
import vlmcompress.flex
from vlmcompress import Composition, Method, Stage
from vlmcompress.attach import current_handle
from vlmcompress.registry import Registry
from vlmcompress.views import Cut, EntryTokens, Selection

N = 36
ENTRY = {"methods": [{"method": "grid", "options": {"keep": 4}}], "positions": "published"}


@pytest.fixture
def model():
    return tiny_llava(eos_token_id=None)


@pytest.fixture
def inputs():
    return prompts([[5, "image", 7], [2, "image", 3]], N)


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


# methods of other packages --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Steps(Method):
    """Keep the tokens at the places ``at``, a list that no validate looks at."""

    at: tuple[int, ...] = (0,)
    scale: float = 1.0
    loud: bool = False
    note: str | None = None

    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        images = len(tokens.layout)
        return Selection(torch.tensor([self.at] * images), [len(self.at)] * images)


@torch.no_grad()
def test_a_list_becomes_the_tuple_that_is_wanted(model, inputs):
    assert Steps(at=[3, 1]) == Steps(at=(3, 1))
    with vlmcompress.compress(model, Steps(at=[1, 3])) as handle:
        model(**inputs)
        assert handle.last.samples[0].images[0].kept.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("option", "value"),
    [("at", "abc"), ("at", 3), ("at", (1.5,)), ("scale", "x"), ("scale", True), ("loud", 1), ("note", 3)],
)
def test_an_option_of_a_wrong_type(option, value):
    with pytest.raises(ValueError, match=f"The option {option} of 'Steps' takes .*, not .*[.]$"):
        Steps(**{option: value})


@pytest.mark.parametrize(("name", "option"), [("vtc-cls", "layers"), ("transprune", "layers"), ("h2o", "visual_share")])
def test_a_comparison_that_fails_is_no_answer(model, name, option):
    with pytest.raises(ValueError, match=f"{option}.* not "):
        vlmcompress.compress(model, name, **{option: "x"})
    assert current_handle(model) is None


def test_a_hook_that_would_never_be_called(model):
    @dataclass(frozen=True)
    class Forgetful(Method):
        def entry(self, tokens, state):
            return None

    with pytest.raises(ValueError, match="'Forgetful' has a hook 'entry' that is never called"):
        vlmcompress.compress(model, Forgetful())


def _made(hook: str, answer) -> Method:
    @dataclass(frozen=True)
    class Made(Method):
        stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY if hook == "entry" else Stage.PREFILL})

        def cut_layers(self, adapter):
            return [1] if hook == "prefill" else []

    setattr(Made, hook, lambda self, view, state: answer(view))
    return Made()


PLACES = torch.tensor([[1, 3]] * 2)
MISTAKES = [
    ("entry", lambda view: view.layout.valid, "Tensor instead of Selection"),
    ("entry", lambda view: Selection(PLACES[:1], [2]), "counts .2.; wanted is a list of one int per image"),
    ("entry", lambda view: Selection(PLACES, torch.tensor([2, 2])), "counts tensor"),
    ("entry", lambda view: Selection(PLACES, [5, 5]), "for a keep of 2 places"),
    ("entry", lambda view: Selection(PLACES[0], [2, 2]), "a keep of torch.int64 .2.; wanted is torch.int64 .2, any."),
    ("entry", lambda view: Selection(PLACES.float(), [2, 2]), "a keep of torch.float32"),
    ("entry", lambda view: Selection(PLACES, [2, 2], features=torch.zeros(2, 5, 7)), "features of"),
    ("prefill", lambda view: view.frame.text, "Tensor instead of Cut"),
    ("prefill", lambda view: Cut(view.frame.text[:, :5], [0, 0]), "a mask of torch.bool .2, 5."),
    ("prefill", lambda view: Cut(view.frame.text, [99, 0]), "counts .99, 0."),
]


@pytest.mark.parametrize(("hook", "answer", "says"), MISTAKES)
@torch.no_grad()
def test_a_mistake_in_a_method_is_named(model, inputs, hook, answer, says):
    stock = model(**inputs).logits
    with vlmcompress.compress(model, _made(hook, answer)), pytest.raises(ValueError, match=says) as caught:
        model(**inputs)
    assert str(caught.value).startswith(f"The {hook} hook of 'Made' answered")
    assert model(**inputs).logits.equal(stock)


@pytest.mark.parametrize("parts", [(), ("grid",), (Steps(), 3)])
def test_what_no_composition_can_be_made_of(parts):
    with pytest.raises(ValueError, match="composition"):
        Composition.of(*parts)
    with pytest.raises(ValueError, match="composition"):
        Steps() + "h2o"


def _package(folder, name: str, code: str, point: str) -> None:
    """A package as pip installs it, with one entry point in the group ``tests.made``."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[tests.made]\n{point}\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_package_that_cannot_be_loaded_is_named_every_time(installed):
    _package(installed, "brokenpack", "import nothing_of_this_name\n", "broken = brokenpack")
    registry = Registry("method", "tests.made", ())
    for _ in range(2):
        with pytest.raises(ValueError, match="'broken' of the installed package 'brokenpack' cannot be loaded"):
            registry.items()


def test_a_second_thread_waits_for_the_first_one_to_load(installed):
    code = "import time\nimport tests_made_here\ntime.sleep(0.3)\ntests_made_here.registry.register('late')(object)\n"
    _package(installed, "slowpack", code, "late = slowpack")
    registry = Registry("method", "tests.made", ())
    module = sys.modules["tests_made_here"] = type(sys)("tests_made_here")
    module.registry = registry
    seen: list[list[str]] = []
    threads = [threading.Thread(target=lambda: seen.append(list(registry.items()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["late"]] * 3
