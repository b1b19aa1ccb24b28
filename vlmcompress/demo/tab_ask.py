# SPDX-License-Identifier: Apache-2.0
"""The first tab: one question to the uncompressed and to the compressed model, side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from ..method import POSITIONS
from . import html
from .ask import UNCOMPRESSED, Run, ask, check_question, compose, tokens_at
from .figures import run_dict
from .models import SAMPLES, Loaded, methods_for, second_stages
from .parts import MODEL, SILENT, Page, budget_slider, looked_at, opened, told, upload_box, words_of
from .picture import legend, paint

METHOD = "vtc-cls"
NONE = "(none)"


def first_method(family: str) -> str:
    """The method that is chosen when a model has been loaded."""
    known = methods_for(family)
    return METHOD if METHOD in known else next(iter(known))


def examples() -> list[list[str]]:
    """A picture and a question each, from what the repository ships; empty without it."""
    listed = SAMPLES / "questions.json"
    if not listed.is_file():
        return []
    found: dict[str, str] = {}
    for entry in json.loads(listed.read_text(encoding="utf-8")):
        found.setdefault(entry["image"], entry["question"])
    return [[str(SAMPLES / image), question] for image, question in found.items()]


def build(page: Page) -> None:
    """Put the tab's components on the page and connect them."""
    family = page.first.family
    count, kept = gr.State(None), gr.State(None)
    with gr.Row():
        with gr.Column(min_width=300):
            image = upload_box("vc-image")
            looked = gr.HTML(elem_id="vc-looked")
            question = gr.Textbox(
                label="Question", placeholder="what color is the ring", lines=1, elem_id="vc-question"
            )
            if examples():
                gr.Examples(examples(), [image, question], label="Examples", examples_per_page=4, elem_id="vc-examples")
        with gr.Column(min_width=300):
            method = gr.Dropdown(_choices(family), value=first_method(family), label="Method", elem_id="vc-method")
            slider, words = budget_slider("vc-budget")
            second = gr.Dropdown([NONE, *second_stages(family)], value=NONE, label="Second stage", elem_id="vc-second")
            positions = gr.Radio(list(POSITIONS), value="published", label="Position ids of the kept tokens")
            with gr.Accordion("More", open=False):
                options = gr.Textbox(label="Options of the method", placeholder="NAME=VALUE NAME=VALUE", max_lines=1)
                others = gr.Textbox(label="Options of the second stage", placeholder="NAME=VALUE", max_lines=1)
                length = gr.Slider(1, 256, page.first.new_tokens(), step=1, label="Longest answer, tokens", buttons=[])
            go = gr.Button("Ask", variant="primary", elem_id="vc-ask")
            message = gr.HTML(elem_id="vc-message")
    with gr.Row():
        before = gr.HTML(html.answer_card("Uncompressed", None), elem_id="vc-before")
        after = gr.HTML(html.answer_card("Compressed", None), elem_id="vc-after")
    with gr.Row():
        with gr.Column(min_width=300):
            picture = gr.Image(
                label="Kept tokens", interactive=False, type="pil", format="png", elem_id="vc-picture",
                buttons=["download", "fullscreen"], alt_text="the picture, its dropped tokens dimmed",
            )  # fmt: skip
            told_picture = gr.HTML(elem_id="vc-picture-words")
            layer = gr.Slider(
                0, page.first.layers - 1, 0, step=1, label="Decoder layer", elem_id="vc-layer", buttons=[]
            )
            colour = gr.Checkbox(True, label="Colour by the method's score", elem_id="vc-colour")
            layers = gr.HTML(elem_id="vc-profile")
        with gr.Column(min_width=300):
            costs = gr.HTML(elem_id="vc-costs")
            save = gr.DownloadButton("Download as JSON", interactive=False, size="sm", elem_id="vc-json")

    def drawn(run: Run | None, layer_value: float, coloured: bool) -> dict[Any, Any]:
        answer = None if run is None else next((a for n, a in run.answers.items() if n != UNCOMPRESSED), None)
        if answer is None or answer.ledger is None:
            return {picture: None, told_picture: "", layers: ""}
        tokens = answer.report.layer_tokens
        shown = min(int(layer_value), len(tokens) - 1)
        return {
            picture: paint(run, answer, shown, colour=coloured),
            told_picture: html.sentence(legend(answer, shown, colour=coloured), "note"),
            layers: html.profile(answer.report.tokens_before, tokens, shown),
        }

    @told(message)
    def answered(
        path, text, name, step, second_name, option, other, policy, longest, at, coloured, model
    ) -> Iterator[dict[Any, Any]]:
        text = check_question(text)
        shot = opened(path)
        loaded = page.pool.get(model)
        n, _ = looked_at(page, path, model)
        chosen = compose(
            name, tokens_at(step, n or 1), option or "", "" if second_name == NONE else second_name, other or ""
        )
        yield {
            before: html.answer_card("Uncompressed", None), after: html.answer_card(f"Compressed: {chosen.name}", None),
            costs: "", picture: None, told_picture: "", layers: "", kept: None, save: gr.update(interactive=False),
        }  # fmt: skip
        run = None
        for run in ask(loaded, shot, text, {chosen.name: chosen}, positions=policy, new_tokens=int(longest)):
            yield {
                before: html.answer_card("Uncompressed", run.answers[UNCOMPRESSED]),
                after: html.answer_card(f"Compressed: {chosen.name}", run.answers[chosen.name]),
            }
        yield {
            **drawn(run, at, coloured),
            costs: html.costs(run, chosen.name),
            kept: run,
            save: gr.update(value=page.shelf.json("answer.json", run_dict(run)), interactive=True),
        }

    asked = [image, question, method, slider, second, options, others, positions, length, layer, colour, page.model]
    gr.on(
        [go.click, question.submit], answered, asked,
        [message, before, after, costs, picture, told_picture, layers, kept, save],
        show_progress="minimal", show_progress_on=[after], **MODEL,
    )  # fmt: skip

    def look(path: str | None, step: float, name: str, model: str) -> tuple[int | None, str, str]:
        n, said = looked_at(page, path, model)
        return n, said, words_of(step, n, name)

    image.change(look, [image, slider, method, page.model], [count, looked, words], **SILENT, **MODEL)
    gr.on([slider.change, method.change], words_of, [slider, count, method], words, **SILENT)
    gr.on([layer.change, colour.change], drawn, [kept, layer, colour], [picture, told_picture, layers], **SILENT)

    page.follow(method, lambda m: gr.update(choices=_choices(m.family), value=first_method(m.family)))
    page.follow(second, lambda m: gr.update(choices=[NONE, *second_stages(m.family)], value=NONE))
    page.follow(layer, lambda m: gr.update(maximum=m.layers - 1, value=0))
    page.follow(length, lambda m: gr.update(value=m.new_tokens()))
    page.follow(count, lambda m: None)
    page.model.change(look, [image, slider, method, page.model], [count, looked, words], **SILENT, **MODEL)


def _choices(family: str) -> list[tuple[str, str]]:
    return [(f"{name} – {summary}" if summary else name, name) for name, summary in methods_for(family).items()]


def load_label(loaded: Loaded) -> str:
    """The line that names the model which a session uses."""
    parameters = sum(p.numel() for p in loaded.model.parameters())
    size = f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"
    return html.sentence(
        f"{loaded.label}: family {loaded.family}, {size} parameters, {loaded.layers} decoder layers.", "ok"
    )
