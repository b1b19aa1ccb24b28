# SPDX-License-Identifier: Apache-2.0
"""``accelerate launch`` with two processes on this machine: the same answers and scores as one."""

import json
import subprocess
import sys

import pytest

from vlmcompress.commands.evaluate import Settings, evaluate
from vlmcompress.eval.workers import Workers, workers

TASKS, LIMIT = "scenes,easy-vqa", 14


def launch(folder, out, *further):
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m", "vlmcompress.eval",
         str(folder), "--methods", "grid,random", "--keep", "9", "--tasks", TASKS, "--limit", str(LIMIT), "--seeds", "1",
         "--batch-size", "5", "--rounds", "0", "--out", str(out), *further],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def test_two_processes_are_one_run(tiny_folder, tmp_path):
    """14 + 14 questions in batches of five: six batches and a rest, one row with options that fail."""
    row = ("--row", "fastv keep=9 layer=99")
    run = launch(tiny_folder, tmp_path / "two", *row)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Written:") == 1
    settings = Settings(
        str(tiny_folder),
        "grid,random",
        "9",
        TASKS,
        LIMIT,
        tmp_path / "one",
        1,
        5,
        4,
        rounds=0,
        device="cpu",
        rows=row[1:],
    )
    alone = evaluate(settings)
    both = json.loads((tmp_path / "two" / "report.json").read_text())
    assert both["rows"] == json.loads(json.dumps(alone["rows"]))
    assert [bool(r["error"]) for r in both["rows"]] == [False, False, False, True]
    assert (both["environment"]["processes"], alone["environment"]["processes"]) == (2, 1)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one" / "answers").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "two" / "answers").iterdir()} == files
    # a later process, alone, goes on with what the two have stored
    again = evaluate(Settings(**{**vars(settings), "out": tmp_path / "two"}))
    assert json.loads(json.dumps(again["rows"])) == both["rows"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "two" / "answers").iterdir()} == files


@pytest.mark.parametrize(
    ("name", "launcher"),
    [("OMPI_COMM_WORLD_SIZE", "mpirun"), ("SLURM_STEP_NUM_TASKS", "srun"), ("WORLD_SIZE", "a launcher")],
)
def test_processes_of_another_launcher_are_refused(name, launcher, tiny_folder, tmp_path, monkeypatch):
    """Each of them would answer everything, into one folder."""
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=rf"^{launcher} started 2 of this process \({name}=2\).*accelerate launch"):
        evaluate(
            Settings(str(tiny_folder), "grid", "9", TASKS, LIMIT, tmp_path / "out", 1, 5, 4, rounds=0, device="cpu")
        )
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv(name, "1")
    assert workers("cpu") == Workers(0, 1, "cpu")


def test_a_job_script_that_runs_one_process_is_no_launch(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    assert workers("cpu") == Workers(0, 1, "cpu")


def test_a_process_without_a_launcher_is_alone():
    alone = workers("cpu")
    assert alone == Workers(0, 1, "cpu")
    assert alone.main
    assert alone.gather("x") == ["x"]
    assert alone.share({"a": 1}) == {"a": 1}
