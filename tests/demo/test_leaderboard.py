# SPDX-License-Identifier: Apache-2.0
"""The table of committed results: filters, orders, commands."""

import json
import shlex
import shutil

import pytest
from typer.testing import CliRunner

from vlmcompress.cli import app
from vlmcompress.demo import html, leaderboard
from vlmcompress.demo.models import RESULTS


@pytest.fixture(scope="module")
def lines():
    return leaderboard.read(RESULTS)


def test_every_finished_row_of_every_report_is_there(lines):
    wanted = 0
    for path in RESULTS.glob("*/report.json"):
        wanted += sum(len(row.get("tasks", {})) for row in json.loads(path.read_text())["rows"])
    assert len(lines) == wanted > 50


def test_filters_keep_what_others_are_held_against(lines):
    values = leaderboard.choices(lines)
    assert all(found[0] == leaderboard.ALL for found in values.values())
    keep, task = values["keep"][1], values["task"][1]
    rows, commands = leaderboard.select(lines, task=task, keep=keep)
    assert len(rows) == len(commands) and {row[1] for row in rows} == {"", keep}
    assert "uncompressed" in {row[0] for row in rows}
    assert all(row[3].startswith(task) for row in rows)
    assert leaderboard.select(lines, model="none of them") == ([], [])


@pytest.mark.parametrize(
    ("order", "column", "falls"), [("accuracy", 2, True), ("FLOPs", 7, False), ("visual tokens", 6, False)]
)
def test_orders(lines, order, column, falls):
    values = [float(row[column].split()[0].replace(",", "")) for row in leaderboard.select(lines, order=order)[0]]
    assert values == sorted(values, reverse=falls) and values[0] != values[-1]
    with pytest.raises(ValueError, match="sorted by"):
        leaderboard.select(lines, order="taste")


def test_commands_are_understood_by_the_command_line(lines):
    with_options = {"method": "vtc-cls", "keep": 8, "options": {"layers": 2}}
    settings = {
        "settings": {"limits": {"scenes": None}, "max_new_tokens": 4, "batch_size": 8},
        "model": {"name": "a/b"},
    }
    commands = {line.command for line in lines} | {leaderboard.command(settings, with_options, "scenes")}
    assert any("'vtc-cls keep=8 layers=2'" in command for command in commands)
    for command in sorted(commands)[:: max(1, len(commands) // 6)]:
        program, name, *arguments = shlex.split(command)
        assert (program, name) == ("vlmcompress", "eval")
        # everything is understood; only the model is not there
        result = CliRunner().invoke(app, [name, "/no/such/model", *arguments[1:]])
        assert "no model folder" in str(result.exception).lower()


def test_damaged_reports_do_not_close_the_page(tmp_path, lines):
    shutil.copytree(RESULTS, tmp_path / "results")
    (tmp_path / "results" / "broken").mkdir()
    (tmp_path / "results" / "broken" / "report.json").write_text("{")
    (tmp_path / "results" / "other").mkdir()
    (tmp_path / "results" / "other" / "report.json").write_text('{"schema": "another/1"}')
    assert leaderboard.read(tmp_path / "results") == lines
    assert leaderboard.read(tmp_path / "nowhere") == []


def test_the_table_in_html_has_a_row_and_a_command_each(lines):
    rows, commands = leaderboard.select(lines)
    text = html.table(leaderboard.HEAD, rows, commands)
    assert text.count("<tr>") == len(rows) + 1 and text.count("<code>vlmcompress eval") == len(rows)
    assert "No row fits" in html.table(leaderboard.HEAD, [])
