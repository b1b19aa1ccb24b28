# SPDX-License-Identifier: Apache-2.0
"""The HTML report, made from a real run of the shipped model."""

import json
import re
from pathlib import Path

import pytest

from vlmcompress.commands.evaluate import Settings, evaluate
from vlmcompress.eval import page

MODEL = str(Path(__file__).parents[2] / "assets/models/tiny-llava")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "small"
    evaluate(
        Settings(
            model=MODEL, methods="random,transprune", keep="32", tasks="scenes", limit=16, out=out, seeds=1,
            batch_size=16, max_new_tokens=4, rounds=1, device="cpu",
        )
    )  # fmt: skip
    return out


def test_one_file_holds_everything(folder, tmp_path):
    written = page.write([folder], tmp_path / "new" / "report.html")
    text = written[0].read_text()
    assert [p.name for p in written[1:]] == ["report-small-flops.png", "report-small-latency.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written[1:])
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    report = json.loads((folder / "report.json").read_text())
    accuracy = report["rows"][0]["tasks"]["scenes"]["accuracy"]
    assert f"{100 * accuracy:.1f} [" in text and text.count("<tr") == 1 + len(report["rows"])


def test_disagreements_are_drawn(folder, tmp_path):
    report = page.read(folder)
    found = page.disagreements(folder, report, MODEL, 2)
    assert found, "16 questions at two ninths of the tokens leave something to disagree about"
    for it in found:
        assert {v.correct for v in it.views} == {True, False}
        assert {v.method for v in it.views} == {"random", "transprune"}
    written = page.write([folder], tmp_path / "report.html", model=MODEL, samples=1)
    text = written[0].read_text()
    assert "Where the methods disagree" in text and found[0].sample.question in text
    assert written[-1].name == "report-small-layers.png"


def test_bad_input_gets_a_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match=r"holds no report\.json"):
        page.write([tmp_path], tmp_path / "report.html")
    other = tmp_path / "other"
    other.mkdir()
    (other / "report.json").write_text('{"schema": "something else"}')
    with pytest.raises(ValueError, match=r"other"):
        page.write([other], tmp_path / "report.html")
    report = page.read(folder)
    report["model"]["fingerprint"] = "0"
    with pytest.raises(ValueError, match="was not measured with the model"):
        page.disagreements(folder, report, MODEL, 1)
