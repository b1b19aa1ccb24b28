# SPDX-License-Identifier: Apache-2.0
"""The README's table is the one in ``results/``."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def table(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_readme_shows_the_committed_table():
    committed = table((ROOT / "results/tiny-llava-quickstart-2cpu-fp32/report.md").read_text())
    assert len(committed) > 20
    assert table((ROOT / "README.md").read_text()) == committed
