# SPDX-License-Identifier: Apache-2.0
"""Runs that end badly, in processes of their own: one sentence, and everything finished stays readable."""

import json
import resource
import signal
import subprocess
import sys
import time

import pandas
import pytest

from vlmcompress.cli import explain
from vlmcompress.commands.evaluate import Settings, evaluate
from vlmcompress.eval import results
from vlmcompress.eval.schema import FOLDER, Answer, check, schemas
from vlmcompress.eval.store import Store
from vlmcompress.eval.tasks import base


def command(folder, out, *further):
    return [sys.executable, "-m", "vlmcompress.eval", str(folder), "--methods", "grid", "--keep", "9", "--tasks",
            "scenes", "--batch-size", "8", "--rounds", "0", "--out", str(out), *further]  # fmt: skip


def stored(out):
    """Answers by row as pandas reads them, and as the store does."""
    frames = {path.stem: pandas.read_json(path, lines=True) for path in (out / "answers").iterdir()}
    store = Store(out, json.loads((out / "configuration.json").read_text()))
    assert {row: len(frame) for row, frame in frames.items()} == {row: len(store.answers(row)) for row in frames}
    return frames


def test_an_interrupt_keeps_what_is_finished(tiny_folder, tmp_path):
    out = tmp_path / "out"
    # tests that run in the background of a shell inherit an ignored SIGINT, which a user at a terminal never has
    run = subprocess.Popen(
        command(tiny_folder, out, "--full"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    answers, deadline = out / "answers" / "none.jsonl", time.monotonic() + 120
    while not (answers.exists() and answers.stat().st_size):
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert said.strip().splitlines()[-1] == "Interrupted; everything finished is kept."
    assert "Traceback" not in said
    kept = stored(out)["none"]
    assert 8 <= len(kept) < 2399
    assert len(kept) % 8 == 0
    assert not (out / "report.json").exists()


def test_a_full_disk_keeps_what_is_finished_and_the_run_goes_on_later(tiny_folder, tmp_path):
    out, room = tmp_path / "out", 12_000  # bytes per file: about half of a row
    run = subprocess.run(
        command(tiny_folder, out, "--limit", "48"), capture_output=True, text=True, timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr.strip().splitlines() == [f"{out}/answers/none.jsonl: File too large."]
    assert (out / "answers" / "none.jsonl").stat().st_size == room
    store = Store(out, json.loads((out / "configuration.json").read_text()))
    before = store.answers("none")  # drops the line that was cut
    assert 8 <= len(before) < 48
    stored(out)
    report = evaluate(
        Settings(str(tiny_folder), "grid", "9", "scenes", 48, out, 1, 8, 4, rounds=0, device="cpu")
    )  # fmt: skip
    assert [row["error"] for row in report["rows"]] == [None, None]
    assert store.answers("none")[: len(before)] == before
    assert results.load_report(out / "report.json")["rows"][0]["tasks"]["scenes"]["n"] == 48


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    from pathlib import Path

    from vlmcompress.eval.store import write_json

    write_json(tmp_path / "report.json", {"old": 1})

    def full(self, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as failure:
        write_json(tmp_path / "report.json", {"new": 1})
    assert explain(failure.value) == f"{tmp_path}/report.json: No space left on device."
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "report.json").read_text()) == {"old": 1}


def test_missing_data_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "FOLDER", tmp_path)
    with pytest.raises((ValueError, OSError)) as failure:
        base.load("scenes")
    sentence = explain(failure.value)
    assert str(tmp_path) in sentence
    assert "\n" not in sentence


@pytest.fixture
def answer():
    return dict(
        task="toy", id="1", image="ab", kind="color", question="what ?", answer="red", prediction="red", correct=1.0,
        tokens_in=4, layer_tokens=4.0, compressor_flops=0, kv_bytes=8, macs=1, flops=2, full=3,
    )  # fmt: skip


def test_lines_that_are_no_answers_are_refused(tmp_path, answer):
    store = Store(tmp_path, {})
    store.append("grid", [answer])
    assert store.answers("grid") == [answer]
    store.append("grid", [answer | {"correct": 7}])
    with pytest.raises(
        ValueError, match=r"grid\.jsonl, line 2, is no valid answer: correct: .*less than or equal to 1"
    ):
        store.answers("grid")
    del answer["prediction"]
    with pytest.raises(ValueError, match="prediction: Field required"):
        check(Answer, answer, "here")


def test_a_half_written_report_is_refused(tmp_path):
    path = tmp_path / "report.json"
    path.write_text('{"schema": "vlmcompress.report/1", "rows": [')
    with pytest.raises(ValueError, match="damaged"):
        results.load_report(path)
    path.write_text('{"schema": "vlmcompress.report/1", "rows": []}')
    with pytest.raises(ValueError, match="is no valid report: model: Field required"):
        results.load_report(path)


@pytest.mark.parametrize("name", list(schemas()))
def test_the_schema_files_are_what_the_code_checks(name):
    assert (FOLDER / name).read_text() == schemas()[name], "write them with: python -m vlmcompress.eval.schema"
