# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation on a random model: rows, resuming, failures, report."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import vlmcompress
from vlmcompress.commands.evaluate import Settings, evaluate
from vlmcompress.eval import results, runner, table
from vlmcompress.eval.flops import ModelShape
from vlmcompress.eval.loading import answer, encode, fingerprint, load
from vlmcompress.eval.profiles import compressed
from vlmcompress.eval.rows import STANDARD, Row, parse_keep, plan
from vlmcompress.eval.store import Store
from vlmcompress.eval.tasks import Sample
from vlmcompress.method import Method, Stage
from vlmcompress.registry import METHODS


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load(str(tiny_folder))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8)) for _ in range(4)]
    questions = ["what color is the star ?", "is there a ring ?", "how many"]
    return {
        "toy": [
            Sample(f"{p}-{q}", picture, question, "red", f"kind{q}")
            for p, picture in enumerate(pictures)
            for q, question in enumerate(questions)
        ]
    }


def settings(folder, out, **changes):
    base = dict(
        model=str(folder), methods="standard", keep="12,4", tasks="scenes", limit=6, out=out, seeds=2, batch_size=4,
        max_new_tokens=2, rounds=1, device="cpu",
    )  # fmt: skip
    return Settings(**(base | changes))


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("eval") / "out"
    return out, evaluate(settings(tiny_folder, out))


def test_every_row_is_there(finished):
    _, report = finished
    keys = [row["key"] for row in report["rows"]]
    assert keys[0] == "none"
    assert keys == [row.key for row in plan(STANDARD, [12, 4], range(2))]
    assert [row["key"] for row in report["rows"] if row["error"]] == []
    assert len(keys) == 2 + 7 * 2


def test_the_report_says_what_was_done(finished):
    out, report = finished
    assert results.load_report(out / "report.json") == json.loads(json.dumps(report))
    rows = {row["key"]: row for row in report["rows"]}
    assert rows["none"]["tokens_in"] == rows["none"]["layer_tokens"] == 36
    assert rows["no-vision"]["tokens_in"] == 0
    assert rows["grid-keep12"]["tokens_in"] == 12
    assert rows["fastv-keep12"]["tokens_in"] == 36
    assert 12 < rows["fastv-keep12"]["layer_tokens"] < 36
    assert rows["none"]["tasks"]["scenes"]["retained"] in (None, {"value": 1.0, "low": 1.0, "high": 1.0})
    assert rows["random-keep4"]["seeds"] == [0, 1]
    assert rows["resize-keep4"]["full"] < rows["grid-keep4"]["full"] < rows["none"]["full"]
    for row in report["rows"]:
        assert row["timing"]["prefill_ms"]["median"] > 0
        assert row["timing"]["prefill_peak_bytes"] > 0
        assert row["tasks"]["scenes"]["n"] == 6


def test_files_are_readable(finished):
    out, report = finished
    text = (out / "report.md").read_text()
    assert text.count("\n| ") >= len(report["rows"])
    picture = np.asarray(Image.open(out / "frontier.png"))
    assert picture.shape[1] > 600
    assert picture.std() > 10
    lines = [json.loads(line) for line in (out / "answers" / "grid-keep12.jsonl").read_text().splitlines()]
    assert {"task", "id", "image", "prediction", "answer", "correct", "full"} <= set(lines[0])


def test_resuming_runs_nothing_again(finished, tiny_folder, monkeypatch):
    out, report = finished
    monkeypatch.setattr(runner, "_batch", lambda *_: pytest.fail("an answer was computed twice"))
    again = evaluate(settings(tiny_folder, out, rounds=0))
    assert [r["tasks"] for r in again["rows"]] == [r["tasks"] for r in report["rows"]]


def test_an_interrupted_row_goes_on_where_it_stopped(loaded, samples, tmp_path):
    model, processor = loaded
    rows, asked = [Row("grid", 9)], []
    whole = Store(tmp_path / "whole", {"a": 1})
    runner.run_rows(model, processor, rows, samples, whole, batch_size=4)
    cut = Store(tmp_path / "cut", {"a": 1})
    path = cut.folder / "answers" / "grid-keep9.jsonl"
    path.write_bytes((whole.folder / "answers" / "grid-keep9.jsonl").read_bytes()[:-200])
    held = len(cut.answers("grid-keep9"))
    assert 0 < held < 12
    runner.run_rows(model, processor, rows, samples, cut, batch_size=4, tick=lambda row, n: asked.append(n))
    assert asked[0] == held
    assert sum(asked) == 12
    strip = [[(a["id"], a["prediction"]) for a in s.answers("grid-keep9")] for s in (whole, cut)]
    assert strip[0] == strip[1]


def test_another_configuration_is_refused(finished, tiny_folder):
    out, _ = finished
    with pytest.raises(ValueError, match=r"another configuration \(it differs in tasks\)"):
        evaluate(settings(tiny_folder, out, limit=7))


def test_a_failing_row_leaves_the_others(loaded, samples, tmp_path):
    model, processor = loaded
    rows = [Row("none"), Row("fastv", 9, options={"layer": 99}), Row("grid", 9)]
    store = Store(tmp_path, {})
    errors = runner.run_rows(model, processor, rows, samples, store)
    assert list(errors) == ["fastv-keep9-layer=99"]
    assert "\n" not in errors["fastv-keep9-layer=99"]
    summary = results.summarize(store, rows, ["toy"], errors=errors, timings={}, expected=12)
    assert [bool(row["error"]) for row in summary] == [False, True, False]
    report = {"settings": {"tasks": {"toy": 12}}, "rows": summary}
    assert "failed" in table.markdown(report)
    with vlmcompress.compress(model, "grid", keep=3):  # the failure left nothing on the model
        pass


@dataclass(frozen=True)
class FailsLater(Method):
    """A prompt passes, the second answered token does not."""

    name: ClassVar[str] = "fails-later"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.CACHE})

    def cache(self, layer, state):
        if not layer.prefill:
            raise RuntimeError("no room to decode")


def test_a_clock_that_fails_leaves_the_answers_and_the_other_clocks(loaded, samples, tmp_path, monkeypatch):
    model, processor = loaded
    METHODS.items()
    monkeypatch.setitem(METHODS._items, "fails-later", FailsLater)
    rows, store = [Row("none"), Row("fails-later"), Row("grid", 9)], Store(tmp_path, {})
    errors = runner.run_rows(model, processor, rows, samples, store, max_new_tokens=1)
    assert not errors
    timings, unclocked = runner.time_rows(model, processor, rows, samples["toy"][0], rounds=1, decode_tokens=1)
    assert set(timings) == {"none", "grid-keep9"}
    assert unclocked == {"fails-later": "no room to decode"}
    summary = results.summarize(store, rows, ["toy"], errors=errors, timings=timings, expected=12, unclocked=unclocked)
    assert [row["error"] for row in summary] == [None, "no room to decode", None]
    assert summary[1]["tasks"] == summary[0]["tasks"]
    report = {"settings": {"tasks": {"toy": 12}}, "rows": summary}
    assert "failed" not in table.markdown(report)


def test_a_row_that_answers_as_the_uncompressed_one_cannot_be_told_from_it(loaded, samples, tmp_path):
    model, processor = loaded
    rows, store = [Row("none"), Row("grid", 1.0)], Store(tmp_path, {})
    right = {"toy": [replace(s, answer="x") for s in samples["toy"]]}
    runner.run_rows(model, processor, rows, right, store)
    for row in rows:  # the small model answers nothing right by itself
        path = tmp_path / "answers" / f"{row.key}.jsonl"
        path.write_text(path.read_text().replace('"correct": 0.0', '"correct": 1.0', 5))
    summary = results.summarize(store, rows, ["toy"], errors={}, timings={}, expected=12)
    assert summary[1]["tasks"]["toy"]["retained"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    lines = table.markdown({"settings": {"tasks": {"toy": 12}}, "rows": summary}).splitlines()[2:]
    assert ["100.0 ≈" in line for line in lines] == [False, True]


def test_uncompressed_answers_are_the_stock_models(loaded, samples, tmp_path):
    model, processor = loaded
    store = Store(tmp_path, {})
    runner.run_rows(model, processor, [Row("none")], samples, store, batch_size=5, max_new_tokens=4)
    stock = []
    for sample in samples["toy"]:
        inputs = encode(model, processor, [sample.image], [sample.question])
        stock += answer(model, processor, inputs, 4)
    assert [a["prediction"] for a in store.answers("none")] == stock


def test_profiles_are_the_same_batched_and_alone(loaded, samples):
    model, processor = loaded
    shape = ModelShape.from_config(model.config)
    chosen = samples["toy"][:3]

    def ask(batch):
        with vlmcompress.compress(model, "fastv", keep=9, layer=1) as handle:
            answer(model, processor, encode(model, processor, [s.image for s in batch], [s.question for s in batch]), 1)
            return compressed(shape, handle.last)

    for batched, alone in zip(ask(chosen), [ask([sample])[0] for sample in chosen], strict=True):
        assert replace(batched, compressor=0) == replace(alone, compressor=0)
        # the method also works on the padding of a batch, and that is counted
        assert batched.compressor >= alone.compressor > 0


def test_a_damaged_store_is_named(tmp_path):
    store = Store(tmp_path, {})
    (tmp_path / "answers" / "grid.jsonl").write_bytes(b'{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"grid\.jsonl is damaged in the middle"):
        store.answers("grid")
    (tmp_path / "configuration.json").write_text("{")
    with pytest.raises(ValueError, match=r"configuration\.json is damaged"):
        Store(tmp_path, {})
    (tmp_path / "report.json").write_text('{"schema": "other"}')
    with pytest.raises(ValueError, match="is no vlmcompress"):
        results.load_report(tmp_path / "report.json")


def test_keep_is_parsed():
    assert [parse_keep(t) for t in ("48", "0.25", "1.0", "1")] == [48, 0.25, 1.0, 1]
    assert isinstance(parse_keep("1"), int)


def test_fingerprints_tell_models_apart(tiny_folder, tmp_path):
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "other")
    assert fingerprint(str(tiny_folder)) == fingerprint(str(tmp_path / "other"))
    weights = bytearray((tmp_path / "other" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "other" / "model.safetensors").write_bytes(weights)
    assert fingerprint(str(tiny_folder)) != fingerprint(str(tmp_path / "other"))
