# SPDX-License-Identifier: Apache-2.0
"""The second tab: one picture and question through up to six methods at one budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from . import html
from .ask import MOST_METHODS, UNCOMPRESSED, ask, check_question, plan, takes_budget, tokens_at
from .figures import compare_figure, run_dict
from .models import methods_for
from .parts import MODEL, SILENT, Page, budget_slider, looked_at, opened, told, upload_box, words_of
from .picture import paint
from .tab_ask import examples

USUAL = ("random", "grid", "vtc-cls", "fastv", "tome", "flowcut")
#: side of the pictures in the grid, which can be enlarged to the window
SIDE = 480


def comparable(family: str) -> list[str]:
    """Methods of a family that take a budget, so that they can be held against each other."""
    return [name for name in methods_for(family) if takes_budget(name)]


def usual(family: str) -> list[str]:
    """What is chosen at first."""
    return [name for name in USUAL if name in comparable(family)]


def whole(image: Image.Image) -> Image.Image:
    """The picture as it was uploaded, as large as the others in the grid."""
    scale = SIDE / max(image.size)
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def build(page: Page) -> None:
    """Put the tab's components on the page and connect them."""
    family = page.first.family
    count = gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300):
            image = upload_box("vc-compare-image")
            looked = gr.HTML()
            question = gr.Textbox(label="Question", placeholder="what color is the ring", elem_id="vc-compare-question")
            if examples():
                gr.Examples(
                    examples(), [image, question], label="Examples", examples_per_page=4, elem_id="vc-compare-examples"
                )
        with gr.Column(min_width=300):
            methods = gr.Dropdown(
                comparable(family), value=usual(family), multiselect=True, max_choices=MOST_METHODS,
                label=f"Methods, up to {MOST_METHODS}", elem_id="vc-compare-methods",
            )  # fmt: skip
            slider, words = budget_slider("vc-compare-budget")
            go = gr.Button("Compare", variant="primary", elem_id="vc-compare")
            message = gr.HTML(elem_id="vc-compare-message")
            with gr.Row():
                as_json = gr.DownloadButton("Download as JSON", interactive=False, size="sm", elem_id="vc-compare-json")
                as_png = gr.DownloadButton("Download as PNG", interactive=False, size="sm", elem_id="vc-compare-png")
    gr.HTML(
        html.sentence("Framed: what the last decoder layer still works on. A click on a picture enlarges it.", "note")
    )
    grid = gr.HTML(elem_id="vc-compare-grid")

    @told(message)
    def compared(path, text, chosen, step, model) -> Iterator[dict[Any, Any]]:
        text = check_question(text)
        shot = opened(path)
        loaded = page.pool.get(model)
        n, _ = looked_at(page, path, model)
        composed = plan(chosen or [], tokens_at(step, n or 1))
        yield {grid: "", as_json: gr.update(interactive=False), as_png: gr.update(interactive=False)}
        run, finished, pictures = None, 0, {UNCOMPRESSED: whole(shot)}
        for run in ask(loaded, shot, text, composed):
            ready = sum(answer.done for answer in run.answers.values())
            if ready > finished:
                finished = ready
                for name, answer in run.answers.items():
                    if answer.ledger is not None and name not in pictures:  # what is left in the last layer
                        pictures[name] = paint(run, answer, loaded.layers - 1, side=SIDE)
                yield {grid: html.grid(run, pictures)}
        target = page.shelf.path("comparison.png")
        compare_figure(run, pictures, target)
        yield {
            grid: html.grid(run, pictures),
            as_json: gr.update(value=page.shelf.json("comparison.json", run_dict(run)), interactive=True),
            as_png: gr.update(value=str(target), interactive=True),
        }

    go.click(
        compared, [image, question, methods, slider, page.model], [message, grid, as_json, as_png],
        show_progress="minimal", show_progress_on=[grid], **MODEL,
    )  # fmt: skip

    def look(path: str | None, step: float, model: str) -> tuple[int | None, str, str]:
        n, said = looked_at(page, path, model)
        return n, said, words_of(step, n)

    image.change(look, [image, slider, page.model], [count, looked, words], **SILENT, **MODEL)
    page.model.change(look, [image, slider, page.model], [count, looked, words], **SILENT, **MODEL)
    slider.change(words_of, [slider, count], words, **SILENT)
    page.follow(methods, lambda m: gr.update(choices=comparable(m.family), value=usual(m.family)))
