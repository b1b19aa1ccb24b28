# SPDX-License-Identifier: Apache-2.0
"""The whole page in a real headless Chromium (``make test-demo``)."""

import json
import sys
from pathlib import Path

import browser as b
import pytest

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="the demo's page needs gradio: pip install 'vlmcompress[demo]'")
pytest.importorskip("playwright", reason="the browser tests need playwright: pip install 'vlmcompress[browser]'")
if b.CHROMIUM is None:
    pytest.skip("the browser tests need a Chromium of the system (apt install chromium)", allow_module_level=True)

from pictures import QUESTION  # noqa: E402

from vlmcompress.demo.models import DEFAULT, SAMPLES  # noqa: E402

CALLS: list[str] = []


@pytest.fixture(scope="module")
def address():
    """The page's server in this process, with a note of every host that it connects to."""
    from vlmcompress.demo.app import serve

    def note(event, arguments):
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            CALLS.append(str(arguments[1][0]))

    sys.addaudithook(note)
    blocks, found = serve(str(DEFAULT), block=False)
    yield found
    blocks.close()


@pytest.fixture(scope="module")
def chromium():
    with b.chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium, address):
    page = b.visit(chromium, address)
    yield page
    page.context.close()


def asked(page, picture="scene-1.png"):
    b.upload(page, "#vc-image", SAMPLES / picture)
    b.wait_for_words(page, "#vc-budget-words", "of 144")
    b.say(page, "#vc-question", QUESTION)
    page.click("#vc-ask")
    page.wait_for_selector("#vc-costs .vc-metric")
    page.wait_for_selector("#vc-picture img")
    return page.locator("#vc-picture img").get_attribute("src")


def test_both_answers_costs_and_the_overlay(page):
    seen = []
    page.on("request", lambda request: seen.append(request.url))
    first = asked(page)
    assert (b.done(page, "#vc-before"), b.done(page, "#vc-after")) == ("yellow", "yellow")
    b.wait_for_words(page, "#vc-costs", "36")
    b.step(page, "#vc-budget", "12")
    b.wait_for_words(page, "#vc-budget-words", "9 of 144")
    page.click("#vc-ask")
    b.wait_for_words(page, "#vc-costs", "16× less")
    page.wait_for_function("s => (document.querySelector('#vc-picture img') || {src: s}).src != s", arg=first)
    with page.expect_download() as download:
        page.click("#vc-json")
    stored = json.loads(Path(download.value.path()).read_text())
    assert len(stored["answers"][1]["kept"]) == 9
    # nothing is fetched from elsewhere, and the server calls nobody
    assert {url.split("/")[2].split(":")[0] for url in seen if url.startswith("http")} == {"127.0.0.1"}
    assert set(CALLS) <= {"127.0.0.1", "::1", "localhost"}


def test_what_is_wrong_is_said_in_a_sentence_and_the_page_stays_usable(page, tmp_path):
    page.click("#vc-ask")
    b.wait_for_words(page, "#vc-message", "Write a question about the picture.")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    b.upload(page, "#vc-image", tmp_path / "broken.png")
    b.wait_for_words(page, "#vc-looked", "could not be read as a picture")
    b.say(page, "#vc-question", QUESTION)
    page.click("#vc-ask")
    b.wait_for_words(page, "#vc-message", "could not be read as a picture")
    page.locator("#vc-image button[aria-label=Clear], #vc-image button[aria-label='Remove Image']").first.click()
    asked(page)
    assert b.done(page, "#vc-after") == "yellow"
    assert page.locator("#vc-message").inner_text() == ""


def test_two_users_do_not_see_each_other(chromium, page, address):
    other = b.visit(chromium, address)
    b.step(other, "#vc-budget", "12")
    b.upload(other, "#vc-image", SAMPLES / "scene-3.png")
    b.wait_for_words(other, "#vc-budget-words", "9 of 144")
    b.say(other, "#vc-question", "what shape is blue")
    other.click("#vc-ask")
    asked(page)
    other.wait_for_selector("#vc-costs .vc-metric")
    assert b.done(page, "#vc-before") == "yellow" and b.done(other, "#vc-before") == "triangle"
    b.wait_for_words(page, "#vc-budget-words", "36 of 144")
    b.wait_for_words(page, "#vc-costs", "4× less")
    b.wait_for_words(other, "#vc-costs", "16× less")
    other.context.close()


def test_the_comparison_fills(page):
    b.tab(page, "Compare")
    b.upload(page, "#vc-compare-image", SAMPLES / "scene-1.png")
    b.wait_for_words(page, "#vc-compare-budget-words", "of 144")
    b.say(page, "#vc-compare-question", QUESTION)
    page.click("#vc-compare")
    page.wait_for_function("document.querySelectorAll('#vc-compare-grid .vc-cell img').length == 6")
    assert page.locator("#vc-compare-grid .vc-cell").count() == 7


def test_the_sweep_and_the_table(page):
    b.tab(page, "Sweep")
    page.click("#vc-sweep")
    page.wait_for_selector("#vc-sweep-chart img")
    assert page.locator("#vc-sweep-table tbody tr").count() == 5
    b.tab(page, "Results")
    page.wait_for_selector("#vc-table table")
    page.locator("#vc-table summary").first.click()
    assert page.locator("#vc-table code").first.inner_text().startswith("vlmcompress eval ")


@pytest.mark.parametrize("width", [1280, 390])
def test_no_tab_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    for title in ("Compare", "Sweep", "Results", "Ask"):
        b.tab(page, title)
        page.wait_for_timeout(300)
        assert b.too_wide(page) == 0


def test_another_model_is_loaded_and_a_wrong_one_is_told(page, tiny_folder):
    page.locator("#vc-model button").first.click()
    for name, where, words in (
        ("/no/such/folder", "#vc-model-message", "There is no model folder"),
        (str(tiny_folder), "#vc-model-current", tiny_folder.name),
    ):
        box = page.locator("#vc-model-name input")
        box.fill(name)
        box.press("Enter")
        page.click("#vc-model-load")
        b.wait_for_words(page, where, words)
    b.upload(page, "#vc-image", SAMPLES / "scene-1.png")
    b.wait_for_words(page, "#vc-budget-words", "9 of 36")
