# SPDX-License-Identifier: Apache-2.0
"""Tables in pages are those of ``results/`` (``make pages`` fills them)."""

import re
from pathlib import Path

import pytest

from vlmcompress.eval.pages import fill

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "methods").glob("*.md"))]
#: the methods whose pages show what they do on the shipped models
MEASURED = ("vtc-cls", "flowcut", "globalcom2", "transprune", "mustdrop")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_tables_of_a_page_are_the_committed_results(page):
    text = page.read_text()
    assert fill(text) == text


def test_the_readme_shows_the_five_methods_and_their_baselines():
    text = (ROOT / "README.md").read_text()
    tables = re.findall(r"<!-- results/tiny-llava-methods\S* -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert tables
    for name in (*MEASURED, "uncompressed", "no-vision", "random (3 seeds)", "grid", "pool", "resize", "fastv", "tome"):
        assert f"\n| {name} | " in tables[0]


@pytest.mark.parametrize("name", MEASURED)
def test_the_page_of_a_method_shows_its_results(name):
    text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    section = text.split("## Results here\n")[1].split("\n## ")[0]
    assert f"\n| {name} | " in section
    assert "\n| random (3 seeds) | " in section
