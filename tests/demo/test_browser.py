# SPDX-License-Identifier: Apache-2.0
"""The whole page in a real headless Chromium (``make test-demo``)."""

import json
import sys
import time
from pathlib import Path

import browser as b
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
pytest.importorskip("gradio", reason="the demo's page needs gradio: pip install 'vlmcompress[demo]'")
pytest.importorskip("playwright", reason="the browser tests need playwright: pip install 'vlmcompress[browser]'")
if b.CHROMIUM is None:
    pytest.skip("the browser tests need a Chromium of the system (apt install chromium)", allow_module_level=True)

from pictures import QUESTION  # noqa: E402

from vlmcompress.demo.images import MAX_BYTES  # noqa: E402
from vlmcompress.demo.models import DEFAULT, SAMPLES, SHIPPED  # noqa: E402

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
    b.ask(page, SAMPLES / picture, QUESTION, 144)
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


def downloaded(page, button):
    """What a button hands over."""
    with page.expect_download() as download:
        page.click(f"{button}:not([disabled])")
    return Path(download.value.path())


def test_comparison_and_sweep_are_taken_away(page):
    b.tab(page, "Compare")
    page.locator("#vc-compare-examples tbody tr").first.click()
    b.wait_for_words(page, "#vc-compare-budget-words", "of 144")
    page.click("#vc-compare")
    compared = json.loads(downloaded(page, "#vc-compare-json").read_text())
    assert len(compared["answers"]) == 7 and compared["question"] == "what digit stands alone"
    assert Image.open(downloaded(page, "#vc-compare-png")).width > 600
    # a click enlarges a picture to the window
    page.locator("#vc-compare-grid .vc-zoom img").nth(1).click()
    page.wait_for_function(
        "document.querySelectorAll('#vc-compare-grid .vc-zoom img')[1].getBoundingClientRect().width >= innerWidth - 20"
    )
    page.locator("#vc-compare-grid .vc-zoom img").nth(1).click()
    b.tab(page, "Sweep")
    for share in ("12.5 %", "6.25 %"):
        page.get_by_label(share, exact=True).uncheck()
    page.click("#vc-sweep")
    swept = json.loads(downloaded(page, "#vc-sweep-json").read_text())
    assert [point["share"] for point in swept["points"]] == [1.0, 0.5, 0.25]
    assert Image.open(downloaded(page, "#vc-sweep-png")).height > 600


def test_the_table_is_filtered_and_sorted(page):
    b.tab(page, "Results")
    everything = page.locator("#vc-table tbody tr").count()
    b.choose(page, "#vc-table-model", "tiny-llava-next")
    b.wait_for_fewer(page, "#vc-table tbody tr", everything)
    assert set(page.locator("#vc-table tbody td:nth-child(5)").all_inner_texts()) == {"tiny-llava-next"}
    b.choose(page, "#vc-table-order", "FLOPs")
    page.wait_for_function(
        "() => { const x = [...document.querySelectorAll('#vc-table tbody td:nth-child(8)')]"
        ".map(e => +e.innerText.replaceAll(',', '')); return x.every((v, i) => !i || x[i - 1] <= v); }"
    )


def test_the_layer_slider_shows_what_is_alive(page):
    b.choose(page, "#vc-method", "fastv")
    asked(page)
    b.wait_for_words(page, "#vc-profile", "144 of 144 in layer 0")
    first = page.locator("#vc-picture img").get_attribute("src")
    b.step(page, "#vc-layer", "4")
    b.wait_for_words(page, "#vc-profile", "36 of 144 in layer 4")
    b.wait_for_words(page, "#vc-picture-words", "decoder layer 4 works on")
    page.wait_for_function("s => document.querySelector('#vc-picture img').src != s", arg=first)


def test_crops_and_merged_groups_are_drawn(page):
    b.load(page, SHIPPED / "tiny-llava-next", "tiny-llava-next")
    b.choose(page, "#vc-method", "tome")
    b.ask(page, SAMPLES / "hires-1.png", "what color is the ring", 744)
    assert b.done(page, "#vc-after") == "green"
    for words in ("tokens merged into the one with the dot", "seams of the crops", "Below: the whole picture"):
        b.wait_for_words(page, "#vc-picture-words", words)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(300)
    assert b.too_wide(page) == 0
    assert page.locator("#vc-picture img").bounding_box()["width"] > 300  # legible on a phone
    page.locator("#vc-picture button[aria-label*=ullscreen]").click()
    page.wait_for_function("document.querySelector('#vc-picture img').getBoundingClientRect().height > 400")


def test_a_file_too_large_is_refused(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes((SAMPLES / "scene-1.png").read_bytes() + bytes(MAX_BYTES))
    b.upload(page, "#vc-image", large)
    b.wait_for_words(page, "body", "exceed the maximum allowed size")
    asked(page)


def test_uploads_are_deleted_when_the_page_stops(chromium, tmp_path):
    from vlmcompress.demo.app import serve

    blocks, address = serve(str(DEFAULT), block=False)
    mine = tmp_path / f"mine-{time.time_ns()}.png"
    Image.new("RGB", (64, 64), "teal").save(mine)
    page = b.visit(chromium, address)
    b.upload(page, "#vc-image", mine)
    b.wait_for_words(page, "#vc-budget-words", "of 144")
    kept = list(Path(blocks.GRADIO_CACHE).glob(f"*/{mine.name}"))
    page.context.close()
    blocks.close()
    assert len(kept) == 1
    for _ in range(100):  # the server's thread goes on for a moment
        if not kept[0].exists():
            return
        time.sleep(0.1)
    pytest.fail("the upload is still there")


@pytest.mark.parametrize("width", [1280, 390])
def test_no_tab_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    asked(page)
    for title in ("Compare", "Sweep", "Results", "Ask"):
        b.tab(page, title)
        page.wait_for_timeout(300)
        assert b.too_wide(page) == 0
        assert page.locator(".gradio-container").bounding_box()["width"] == min(width, 1180)


def test_another_model_is_loaded_and_a_wrong_one_is_told(page, tiny_folder):
    page.locator("#vc-model button").first.click()
    box = page.locator("#vc-model-name input")
    box.fill("/no/such/folder")
    box.press("Enter")
    page.click("#vc-model-load")
    b.wait_for_words(page, "#vc-model-message", "There is no model folder")
    b.load(page, tiny_folder, tiny_folder.name)
    b.upload(page, "#vc-image", SAMPLES / "scene-1.png")
    b.wait_for_words(page, "#vc-budget-words", "9 of 36")
