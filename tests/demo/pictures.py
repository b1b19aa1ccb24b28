# SPDX-License-Identifier: Apache-2.0
"""Pictures of every tab at 1280 and 390 pixels: ``python tests/demo/pictures.py FOLDER``."""

import sys
from pathlib import Path

import browser as b
from PIL import Image

from vlmcompress.demo.app import serve
from vlmcompress.demo.models import DEFAULT, SAMPLES

QUESTION = "what color is the ring"


def fill(page):
    """Use every tab once; yields the tab's name when it shows its results."""
    b.upload(page, "#vc-image", SAMPLES / "scene-1.png")
    b.wait_for_words(page, "#vc-budget-words", "of 144")
    b.say(page, "#vc-question", QUESTION)
    page.click("#vc-ask")
    page.wait_for_selector("#vc-costs .vc-metric")
    page.wait_for_selector("#vc-picture img")
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


def main(folder: Path) -> None:
    """Write ``TAB-WIDTH.png`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks, address = serve(str(DEFAULT), block=False)
    with b.chromium() as chromium:
        page = b.visit(chromium, address)
        for name in fill(page):
            for width, height in ((1280, 900), (390, 844)):
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(1500)
                path = folder / f"{name}-{width}.png"
                page.screenshot(path=path, full_page=True)
                Image.open(path).convert("RGB").quantize(128).save(path, optimize=True)
            page.set_viewport_size({"width": 1280, "height": 900})
    blocks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
