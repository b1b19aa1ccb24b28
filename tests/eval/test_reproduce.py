# SPDX-License-Identifier: Apache-2.0
"""Published tables: what is pinned, what is run, what is said about the difference."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
from PIL import Image, ImageFile

from vlmcompress.cli import app, explain
from vlmcompress.eval import reproduce, tables
from vlmcompress.eval.schema import Reproduction, check
from vlmcompress.eval.tables import RATIOS, Benchmark

MODEL = str(Path(__file__).parents[2] / "assets/models/tiny-llava")
LIMIT = 12
CSV = f"""model,benchmark,metric,tokens,method,value,source
tiny-llava,scenes,accuracy,144,none,95.8,here
tiny-llava,average,"{RATIOS}",144,none,100,here
tiny-llava,scenes,accuracy,16,grid,20,here
tiny-llava,judged,accuracy,16,grid,50,here
tiny-llava,average,"{RATIOS}",16,grid,80,here
tiny-llava,scenes,accuracy,16,magic,50,here
"""
PINS = {
    "checkpoint": MODEL,
    "protocol": "protocol.json",
    "methods": {"none": {"144": {"method": "none"}}, "grid": {"16": {"method": "grid", "keep": 16}}},
    "left_out": {"magic": "a secret"},
}
PROTOCOL = {
    "about": "This project's own scenes.",
    "model_args": {"dtype": "float32", "system_prompt": "Look, then answer."},
    "average_tolerance": 1,
    "benchmarks": {
        "scenes/accuracy": {"parts": [["scenes", "accuracy"]], "scale": 100, "tolerance": 1},
        "judged/accuracy": {"missing": "a paid judge marks the answers"},
    },
}


@pytest.fixture(scope="module", autouse=True)
def _lmms():
    """Importing lmms-eval tells PIL to accept truncated pictures; the other tests of this process want PIL as it was."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    import_module("lmms_eval.api.task")
    ImageFile.LOAD_TRUNCATED_IMAGES = before


def write(folder, csv=CSV, pins=PINS, protocol=PROTOCOL):
    (folder / "own.csv").write_text(csv)
    (folder / "own.json").write_text(json.dumps(pins))
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return str(folder / "own.csv")


def call(*arguments):
    """The command; its exit code."""
    try:
        code = app(["reproduce", *arguments], standalone_mode=False)
    except typer.Exit as leaving:
        code = leaving.exit_code
    return code


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return write(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def finished(own):
    """Both rows through the real lmms-eval: the exit code, the folder, the report."""
    out = Path(own).parent / "out"
    code = call(own, "--limit", str(LIMIT), "--device", "cpu", "--out", str(out))
    return code, out, json.loads((out / "reproduction.json").read_text())


def test_theirs_ours_difference_verdict(finished):
    code, out, report = finished
    whole, whole_average, grid, judged, average, magic = report["cells"]
    assert code == 1  # one value lies above
    assert (whole["theirs"], whole["verdict"]) == (95.8, "met")
    assert whole["ours"] >= 100 * 9 / LIMIT
    assert grid["verdict"] == "above"
    assert grid["difference"] == pytest.approx(grid["ours"] - 20)
    assert grid["ours"] * LIMIT / 100 == pytest.approx(round(grid["ours"] * LIMIT / 100))
    # the standard error of 20 % right of twelve questions
    assert grid["allowed"] == pytest.approx(1 + 1.96 * 100 * (0.2 * 0.8 / LIMIT) ** 0.5)
    assert (judged["verdict"], judged["reason"]) == ("not run", "a paid judge marks the answers")
    assert (magic["verdict"], magic["reason"]) == ("not run", "a secret")
    assert (whole_average["ours"], whole_average["verdict"]) == (100, "not judged")
    assert average["columns"] == ["scenes"] and average["printed"] == 80
    assert average["theirs"] == pytest.approx(100 * 20 / 95.8)
    assert average["ours"] == pytest.approx(100 * grid["ours"] / whole["ours"])
    assert report["schema"] == "vlmcompress.reproduction/1"
    check(Reproduction, report, "the report")
    with pytest.raises(ValueError, match=r"is no valid reproduction: cells\.0\.verdict"):
        check(Reproduction, report | {"cells": [whole | {"verdict": "fine"}]}, "another")
    assert report["environment"]["torch"]
    told = json.loads((out / "rows" / "grid-16" / "run.json").read_text())["command"]
    assert "vlmcompress" in told and any("method=grid" in part and "keep=16" in part for part in told)
    assert (out / "system_prompt.txt").read_text() == "Look, then answer."


def test_finished_rows_are_not_run_again(finished, own, monkeypatch, capsys):
    _, out, report = finished
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *_, **__: pytest.fail("a row was run twice"))
    arguments = [own, "--limit", str(LIMIT), "--device", "cpu", "--out", str(out)]
    assert call(*arguments) == 1
    assert json.loads((out / "reproduction.json").read_text())["cells"] == report["cells"]
    shown = capsys.readouterr().out
    assert "95.8" in shown and "above" in shown and "a paid judge" in shown
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        call(*arguments, "--batch-size", "3")


def test_what_fails_is_said_and_the_log_is_kept(tmp_path):
    asked = [sys.executable, "-c", "print('fine so far'); raise KeyError('no such thing')"]
    with pytest.raises(ValueError, match=r"lmms-eval failed \(KeyError: 'no such thing'\); see .*log\.txt"):
        reproduce.run_row(tmp_path / "row", asked)
    assert "fine so far" in (tmp_path / "row" / "log.txt").read_text()
    assert not (tmp_path / "row" / "run.json").exists()


def test_without_a_network_it_says_what_it_could_not_reach(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was run"))
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="Nothing was run") as failure:
        call("flowcut/llava-1.5-7b", "--rows", "flowcut 64", "--benchmarks", "GQA,POPE", "--out", str(out))
    sentence = explain(failure.value)
    assert "\n" not in sentence
    for name in ("checkpoint llava-hf/llava-1.5-7b-hf", "lmms-lab-encoder/GQA", "lmms-lab-encoder/POPE"):
        assert name in sentence
    assert "MME" not in sentence
    assert not out.exists()
    # a copy in the cache does
    (tmp_path / "cache" / "models--llava-hf--llava-1.5-7b-hf" / "snapshots").mkdir(parents=True)
    missing, _ = reproduce.unreachable("llava-hf/llava-1.5-7b-hf", {"gqa": {"dataset_path": "lmms-lab-encoder/GQA"}})
    assert missing == ["the data of gqa (lmms-lab-encoder/GQA)"]


def test_without_a_table_it_lists_them(capsys):
    call()
    shown = capsys.readouterr().out
    for name in ("flowcut/llava-1.5-7b", "vtc-cls/llava-1.5-7b", "globalcom2/llava-next-7b"):
        assert name in shown
    assert "llava-hf/llava-1.5-7b-hf" in shown and "flowcut 192" in shown


def test_every_shipped_row_is_pinned_or_says_why_not():
    """Prompt, OCR tokens and metric of every cell; tasks and metrics that this lmms-eval has; methods that accept it."""
    from vlmcompress.method import create

    found = [tables.read(name) for name in tables.names()]
    assert len(found) >= 9
    metrics: dict[str, set[str]] = {}
    for table in found:
        runnable = [cell for cell in table.cells if not table.why_not(cell)]
        assert runnable, table.name
        for cell in runnable:
            run = table.run(cell.row)
            create(run.method, **({} if run.keep is None else {"keep": run.keep}), **run.options)
            if not cell.averages:
                benchmark = table.protocol.benchmarks[f"{cell.benchmark}/{cell.metric}"]
                assert benchmark.tolerance > 0
                assert (
                    (benchmark.prompt or {}).get("post_prompt")
                    or "prompt" in benchmark.note
                    or cell.benchmark == "OCRBench"
                )
                assert "ocr" in benchmark.prompt if cell.benchmark == "TextVQA" else True
                for task, metric in benchmark.parts:
                    metrics.setdefault(task, set()).add(metric)
    configs = reproduce.configurations(reproduce.base_files(metrics))
    for task, names in metrics.items():
        assert names <= {entry["metric"] for entry in configs[task]["metric_list"]}, task
    ocr = tables.read("flowcut/llava-1.5-7b").protocol.benchmarks["TextVQA/accuracy"].prompt["ocr"]
    assert ocr is True  # 58.2 with them, about 46 without


TOY = """
task: toy
dataset_path: json
dataset_kwargs: {token: true, data_files: {test: toy.jsonl}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
metric_list: [{metric: exact_match}]
lmms_eval_specific_kwargs: {default: {pre_prompt: "", post_prompt: " Answer:"}}
"""
UTILS = """
def visual(doc):
    return []

def text(doc, lmms_eval_specific_kwargs=None):
    more = f" OCR: {doc['ocr']}" if lmms_eval_specific_kwargs.get("ocr") else ""
    return doc["question"] + more + lmms_eval_specific_kwargs["post_prompt"]
"""


def test_the_pinned_prompt_is_the_one_that_is_asked(tmp_path):
    from lmms_eval.api.task import ConfigurableMessagesTask
    from lmms_eval.utils import load_yaml_config

    (tmp_path / "toy.yaml").write_text(TOY)
    (tmp_path / "utils.py").write_text(UTILS)
    (tmp_path / "toy.jsonl").write_text(json.dumps({"question": "Which brand?", "answer": "x", "ocr": "ACME"}) + "\n")
    files = {"toy": tmp_path / "toy.yaml"}
    benchmark = Benchmark(parts=[("toy", "exact_match")], prompt={"post_prompt": "\nOne word.", "ocr": True})
    reproduce.pin(tmp_path / "tasks", {"toy": benchmark}, files, reproduce.configurations(files))
    config = load_yaml_config(str(tmp_path / "tasks" / "pinned_toy.yaml"))
    assert "token" not in config["dataset_kwargs"]  # needs no log-in
    task = ConfigurableMessagesTask(config=config, model_name="vlmcompress")
    assert task.doc_to_text(task.eval_docs[0]) == "Which brand? OCR: ACME\nOne word."


def test_the_published_scale():
    pope = Benchmark(parts=[("a", "f1"), ("b", "f1"), ("c", "f1")], scale=100, tolerance=1)
    found = {name: {"f1": (value, 0.01)} for name, value in zip("abc", (0.9, 0.8, 0.85), strict=True)}
    value, error = reproduce.combined(pope, found)
    assert (value, error) == (pytest.approx(85), pytest.approx(100 * 0.01 / 3**0.5))
    mme = Benchmark(parts=[("mme", "p"), ("mme", "c")], combine="sum", tolerance=35)
    assert reproduce.combined(mme, {"mme": {"p": (1500.0, None), "c": (300.0, None)}}) == (1800, None)
    with pytest.raises(ValueError, match="reported no 'c'"):
        reproduce.combined(mme, {"mme": {"p": (1500.0, None)}})
    results = {
        "pinned_a": {"alias": "a", "f1,none": 0.9, "f1_stderr,none": 0.01, "other,none": "x", "g_stderr,none": "N/A"}
    }
    assert reproduce.scores(results) == {"a": {"f1": (0.9, 0.01)}}


def test_verdicts_on_all_questions(tmp_path):
    table = tables.read(write(tmp_path))
    good = {"scenes": {"accuracy": (0.95, 0.004)}}
    entries = reproduce.judge(
        table, {("none", "144"): good, ("grid", "16"): {"scenes": {"accuracy": (0.19, 0.01)}}}, None
    )
    assert [e["verdict"] for e in entries] == ["met", "met", "met", "not run", "met", "not run"]
    assert entries[4]["difference"] == pytest.approx(100 * (0.19 / 0.95 - 20 / 95.8))
    entries = reproduce.judge(
        table, {("none", "144"): good, ("grid", "16"): {"scenes": {"accuracy": (0.189, 0.01)}}}, None
    )
    assert [e["verdict"] for e in entries][2] == "below"  # 1.1 points, of which the standard error forgives nothing
    entries = reproduce.judge(table, {("none", "144"): "lmms-eval failed (x)", ("grid", "16"): good}, None)
    assert [e["verdict"] for e in entries] == ["failed", "failed", "above", "not run", "not run", "not run"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"csv": "model,benchmark\n"}, "is no table: it has the columns"),
        ({"csv": CSV.replace("95.8", "many")}, "a value that is no number"),
        ({"csv": CSV.replace("judged,accuracy", "judged,F1")}, r"does not say how judged \(F1\) is measured"),
        ({"pins": PINS | {"methode": {}}}, "methode: Extra inputs"),
        ({"pins": PINS | {"protocol": "other.json"}}, "names the protocol 'other.json', which is not there"),
        ({"protocol": PROTOCOL | {"benchmarks": {"scenes/accuracy": {"scale": 1}}}}, "parts, or a reason in missing"),
    ],
)
def test_a_table_that_is_none_is_one_sentence(tmp_path, change, says):
    with pytest.raises(ValueError, match=says) as failure:
        tables.read(write(tmp_path, **change))
    assert "\n" not in str(failure.value)


def test_what_is_not_there_is_named(own, tmp_path):
    for arguments, says in [
        (["flowcut/llava-9"], "no published table 'flowcut/llava-9' to reproduce; there are .*flowcut/llava-1.5-7b"),
        ([str(tmp_path / "none.csv")], "There is no file"),
        ([own, "--rows", "grid 17"], "has no row 'grid 17'; it has grid 16, magic 16, none 144"),
        ([own, "--benchmarks", "scene"], "has no benchmark 'scene'; it has judged, scenes"),
        ([own, "--benchmarks", "judged"], "Nothing of .* can be measured here"),
    ]:
        with pytest.raises(ValueError, match=says):
            call(*arguments, "--device", "cpu", "--out", str(tmp_path / "out"))


def test_pictures_are_padded_to_squares():
    from vlmcompress.eval.lmms.model import _squared

    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (4, 2), "red")}, {"type": "text", "text": "?"}],
        }
    ]
    (message,) = _squared(chat, [0.5, 0.25, 0.0])
    square = message["content"][0]["image"]
    assert square.size == (4, 4)
    assert [square.getpixel((0, y)) for y in range(4)] == [(127, 63, 0), (255, 0, 0), (255, 0, 0), (127, 63, 0)]
    assert message["content"][1] == chat[0]["content"][1]
    assert chat[0]["content"][0]["image"].size == (4, 2)
