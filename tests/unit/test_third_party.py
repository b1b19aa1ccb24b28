# SPDX-License-Identifier: Apache-2.0
"""Methods that others write: their options, their mistakes, and the packages that they come in."""

import sys
import threading
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlmcompress
from vlmcompress import Composition, Method, Stage
from vlmcompress.attach import current_handle
from vlmcompress.registry import Registry
from vlmcompress.views import Cut, EntryTokens, Selection


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


def test_options_that_cannot_be_saved(model):
    @dataclass(frozen=True, eq=False)
    class Weighted(Method):
        weights: torch.Tensor

        stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    with pytest.raises(ValueError, match="The options of 'Weighted' cannot be saved"):
        vlmcompress.compress(model, Weighted(torch.ones(2)))
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
