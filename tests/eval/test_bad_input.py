# SPDX-License-Identifier: Apache-2.0
"""What a user can do wrong with ``vlmcompress eval``, beside what `test_interrupted.py` and `test_run.py` hold."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from vlmcompress.commands.evaluate import Settings, evaluate
from vlmcompress.eval.page import write


def settings(folder, out, tasks="scenes", limit=4):
    return Settings(str(folder), "grid", "9", tasks, limit, out, 1, 4, 2, rounds=0, device="cpu")


def test_a_model_that_answers_nothing_is_warned_about(tiny_folder, tmp_path):
    silent = tmp_path / "silent"
    shutil.copytree(tiny_folder, silent)
    weights = load_file(silent / "model.safetensors")
    (head,) = (name for name in weights if name.endswith("lm_head.weight"))
    weights[head].zero_()  # all logits are equal, so the first token wins, which is padding
    save_file(weights, silent / "model.safetensors", metadata={"format": "pt"})
    report = evaluate(settings(silent, tmp_path / "out"))
    assert [row["tasks"]["scenes"]["empty"] for row in report["rows"]] == [1.0, 1.0]
    assert [row["error"] for row in report["rows"]] == [None, None]
    assert report["rows"][0]["tasks"]["scenes"]["retained"] is None
    assert "answers nothing to most questions of scenes" in (tmp_path / "out" / "report.md").read_text()


def test_an_unknown_task_stops_before_anything_is_written(tiny_folder, tmp_path):
    with pytest.raises(
        ValueError, match="There is no task 'scenery'; the tasks are documents, easy-vqa, scenes"
    ) as failure:
        evaluate(settings(tiny_folder, tmp_path / "out", tasks="scenes,scenery"))
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "out").exists()


def test_a_half_written_report_is_no_page(tiny_folder, tmp_path):
    out = tmp_path / "out"
    evaluate(settings(tiny_folder, out))
    whole = (out / "report.json").read_text()
    (out / "report.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        write([out], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    # the answers are whole, so the same command makes the report again
    evaluate(settings(tiny_folder, out))
    assert (out / "report.json").read_text().count('"key"') == whole.count('"key"')
