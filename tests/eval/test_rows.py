# SPDX-License-Identifier: Apache-2.0
"""What a table's rows are, as they are asked for on the command line."""

import json

import pytest

from vlmcompress.commands.evaluate import task_and_limit
from vlmcompress.eval.rows import Row, parse_row, plan
from vlmcompress.method import create


def test_a_row_carries_its_own_options():
    row = parse_row("transprune layers=(1,2) fractions=(0.5,0.1) direction=abs")
    options = {"layers": (1, 2), "fractions": (0.5, 0.1), "direction": "abs"}
    assert row == Row("transprune", None, (None,), options)
    method = create(row.method, **row.arguments(None)).methods[0]
    assert (method.layers, method.fractions, method.direction) == ((1, 2), (0.5, 0.1), "abs")
    assert row.key == "transprune-direction=abs-fractions=(0.5,0.1)-layers=(1,2)"


def test_a_quoted_value_holds_spaces():
    row = parse_row(r"""quota keep=0.5  any_of='is there a {objects} ?' enough="it's: {question}" decouple=r'(\w+)$'""")
    assert row.keep == 0.5
    assert row.options == {"any_of": "is there a {objects} ?", "enough": "it's: {question}", "decouple": r"(\w+)$"}


def test_keep_and_seeds_of_a_row():
    assert parse_row("mustdrop keep=0.25 key_rate=0.02") == Row("mustdrop", 0.25, (None,), {"key_rate": 0.02})
    assert parse_row("random keep=9", seeds=range(2)).seeds == (0, 1)
    once = parse_row("random keep=9 seed=7", seeds=range(2))
    assert once.seeds == (None,)
    assert once.arguments(None) == {"keep": 9, "seed": 7}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "There is no method ''"),
        ("magic keep=3", "no method 'magic'"),
        ("grid colour=3", "no option 'colour'"),
        ("grid keep", "An option is NAME=VALUE, not 'keep'"),
        ("grid keep=0", "keeps nothing"),
        ("quota any_of='is there", "A quote is opened and not closed"),
        ("transprune layers=(1,2) fractions=(0.5,1.5)", "shares between 0 and 1"),
    ],
)
def test_a_bad_row_is_refused_in_one_sentence(text, says):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        parse_row(text)
    assert says in str(error.value)


def test_rows_of_a_method_stand_together_and_once():
    further = [parse_row("grid keep=5"), parse_row("fastv keep=5 layer=1"), parse_row("grid keep=9")]
    keys = [row.key for row in plan(["grid", "pool"], [9], (0,), further)]
    assert keys == ["none", "grid-keep9", "grid-keep5", "pool-keep9", "fastv-keep5-layer=1"]


def test_tasks_have_their_own_number_of_questions():
    assert task_and_limit("scenes", None) == ("scenes", None)
    assert task_and_limit("scenes", 400) == ("scenes", 400)
    assert task_and_limit("easy-vqa:1200", None) == ("easy-vqa", 1200)
    with pytest.raises(ValueError, match="NAME or NAME:QUESTIONS, not 'easy-vqa:x'"):
        task_and_limit("easy-vqa:x", None)


def test_a_run_with_rows_and_numbers_of_its_own(tiny_folder, tmp_path):
    from vlmcompress.cli import main

    out = tmp_path / "out"
    arguments = ["eval", str(tiny_folder), "--methods", "grid", "--keep", "9", "--row", "fastv keep=9 layer=1"]
    arguments += ["--tasks", "scenes:3,easy-vqa:2", "--full", "--rounds", "0", "--out", str(out)]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["tasks"] == {"scenes": 3, "easy-vqa": 2}
    assert [(row["key"], row["error"]) for row in report["rows"]] == [
        ("none", None),
        ("grid-keep9", None),
        ("fastv-keep9-layer=1", None),
    ]
    text = (out / "report.md").read_text()
    assert "| fastv layer=1 | 9 |" in text
    assert "a fixed subset of 3 of scenes, a fixed subset of 2 of easy-vqa" in text
