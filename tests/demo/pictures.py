# SPDX-License-Identifier: Apache-2.0
"""Pictures of every tab at 1280 and 390 pixels, and one for the README: ``python tests/demo/pictures.py FOLDER``."""

import io
import sys
from pathlib import Path

import browser as b
from PIL import Image

from vlmcompress.demo.app import serve
from vlmcompress.demo.models import DEFAULT, SAMPLES, SHIPPED

QUESTION = "what color is the ring"
#: for the README: what is counted, without the clocks of whatever machine draws the picture
COUNTED = "#vc-costs .vc-metric:nth-of-type(n+5), #vc-costs .vc-note { display: none }"
#: pixels; the table of results goes on below
MOST = 2600


def fill(page):
    """Use every tab once; yields the picture's name when there is something to see."""
    b.ask(page, SAMPLES / "scene-1.png", QUESTION, 144)
    yield "ask"
    b.tab(page, "Compare")
    b.upload(page, "#vc-compare-image", SAMPLES / "scene-1.png")
    b.wait_for_words(page, "#vc-compare-budget-words", "of 144")
    b.say(page, "#vc-compare-question", QUESTION)
    page.click("#vc-compare")
    page.wait_for_selector("#vc-compare-png a[href], #vc-compare-png:not([disabled])")
    page.wait_for_function("document.querySelectorAll('#vc-compare-grid .vc-cell').length >= 6")
    yield "compare"
    b.tab(page, "Sweep")
    page.click("#vc-sweep")
    page.wait_for_selector("#vc-sweep-chart img")
    yield "sweep"
    b.tab(page, "Results")
    page.wait_for_selector("#vc-table table")
    yield "results"
    b.tab(page, "Ask")
    b.load(page, SHIPPED / "tiny-llava-next", "tiny-llava-next")
    page.locator("#vc-model button").first.click()
    b.choose(page, "#vc-method", "mustdrop")
    page.locator("#vc-image button[aria-label=Clear], #vc-image button[aria-label='Remove Image']").first.click()
    b.ask(page, SAMPLES / "hires-1.png", QUESTION, 744)
    b.step(page, "#vc-layer", "2")
    b.wait_for_words(page, "#vc-profile", "in layer 2")
    yield "crops"


def main(folder: Path) -> None:
    """Write ``TAB-WIDTH.png`` and ``readme.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks, address = serve(str(DEFAULT), block=False)
    with b.chromium() as chromium:
        page = b.visit(chromium, address)
        for name in fill(page):
            for width, height in ((1280, 900), (390, 844)):
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(1500)
                page.evaluate("scrollTo(0, 0)")
                shown = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
                # true colours: those of the scores would shift in a palette
                shown.crop((0, 0, width, min(shown.height, MOST))).save(folder / f"{name}-{width}.png", optimize=True)
            if name == "crops":
                page.set_viewport_size({"width": 1280, "height": 900})
                page.add_style_tag(content=COUNTED)
                page.wait_for_timeout(500)
                area = page.locator("#vc-before").bounding_box() | {"x": 70, "width": 1140, "height": 1044}
                page.screenshot(path=folder / "readme.png", full_page=True, clip=area)
            page.set_viewport_size({"width": 1280, "height": 900})
    blocks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
