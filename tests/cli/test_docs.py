# SPDX-License-Identifier: Apache-2.0
"""Every published method has a page, and the page is about the method as it is."""

import dataclasses
import re
from pathlib import Path

import pytest

import vlmcompress
from vlmcompress.eval.loading import load

PAGES = Path(__file__).parents[2] / "docs" / "methods"
#: methods described on another one's page
SHARED = {"output-cache": "mustdrop"}
PUBLISHED = {
    name: cls
    for name, cls in vlmcompress.methods().items()
    if cls.__module__.startswith("vlmcompress.methods.") and cls.paper
}


def page_of(name: str) -> str:
    return (PAGES / f"{SHARED.get(name, name)}.md").read_text()


def rows_of(page: str) -> list[tuple[str, str]]:
    """(option, default) of every row of the option tables."""
    return re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", page, re.MULTILINE)


def test_there_is_something_to_describe():
    assert {"vtc-cls", "flowcut", "transprune", "mustdrop", "output-cache", "globalcom2"} <= set(PUBLISHED)
    assert {path.stem for path in PAGES.glob("*.md")} == {SHARED.get(name, name) for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_page_names_every_option_with_its_default(name):
    page, rows = page_of(name), rows_of(page_of(name))
    for field in dataclasses.fields(PUBLISHED[name]):
        assert (field.name, repr(field.default).replace("'", '"')) in rows
    assert f"`{name}`" in page.splitlines()[0]
    assert PUBLISHED[name].paper.removeprefix("arXiv ") in page
    for stage in PUBLISHED[name].stages:
        assert stage.name in page


@pytest.mark.parametrize("page", sorted({SHARED.get(name, name) for name in PUBLISHED}))
def test_the_page_names_no_option_that_is_gone(page):
    mine = [cls for name, cls in PUBLISHED.items() if SHARED.get(name, name) == page]
    fields = {field.name for cls in mine for field in dataclasses.fields(cls)}
    assert {option for option, _ in rows_of(page_of(page))} == fields


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("*.md")))
def test_the_code_and_the_links_of_the_page_work(page, tiny_folder):
    text = page_of(page)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    model, _ = load(str(tiny_folder))
    found = {"vlmcompress": vlmcompress, "model": model}
    exec(compile(block, f"{page}.md", "exec"), found)
    found["handle"].remove()
    from vlmcompress.methods.output_cache import OutputCache
    from vlmcompress.methods.tokenflex import TokenFlex
    from vlmcompress.methods.transprune import TransPrune
    from vlmcompress.methods.vtc_cls import VtcCls

    names = {"VtcCls": VtcCls, "TransPrune": TransPrune, "OutputCache": OutputCache, "TokenFlex": TokenFlex}
    for composed in re.findall(r"`(\w+\([^`]*\)\s\+\s\w+\([^`]*\))`", text):
        vlmcompress.compress(model, eval(composed, names)).remove()
    for link in re.findall(r"\]\(([\w-]+\.md)\)", text):
        assert (PAGES / link).is_file()
