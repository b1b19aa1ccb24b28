# SPDX-License-Identifier: Apache-2.0
"""The third tab: one method over budgets on a small sample of scenes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from . import html
from .figures import sweep_figure
from .parts import MODEL, Page, told
from .sweep import SHARES, Point, sweep
from .tab_ask import first_method
from .tab_compare import comparable

HEAD = ("method", "budget", "accuracy % [95 %]", "visual tokens", "layer average", "GFLOPs", "KV KiB")


def cells(point: Point) -> list[str]:
    """One row in the order of ``HEAD``; a refused budget has its sentence."""
    budget = f"{100 * point.share:.3g} %"
    if point.error:
        return [point.method, budget, point.error, "–", "–", "–", "–"]
    return [
        point.method, budget, f"{100 * point.accuracy:.1f} [{100 * point.low:.1f}, {100 * point.high:.1f}]",
        f"{point.tokens:.1f}", f"{point.layer_tokens:.1f}", "–" if point.gflops is None else f"{point.gflops:.4g}",
        f"{point.kv_kib:,.0f}",
    ]  # fmt: skip


def build(page: Page) -> None:
    """Put the tab's components on the page and connect them."""
    family = page.first.family
    with gr.Row():
        with gr.Column(min_width=300):
            method = gr.Dropdown(
                comparable(family), value=first_method(family), label="Method", elem_id="vc-sweep-method"
            )
            shares = gr.CheckboxGroup(
                [(f"{100 * s:.3g} %", s) for s in SHARES], value=list(SHARES), label="Shares of the visual tokens"
            )
            questions = gr.Slider(
                20, 200, 40, step=20, label="Questions about scenes", elem_id="vc-sweep-n", buttons=[],
                info="The model was asked none of them in training; few questions give wide intervals.",
            )  # fmt: skip
            go = gr.Button("Sweep", variant="primary", elem_id="vc-sweep")
            message = gr.HTML(elem_id="vc-sweep-message")
            with gr.Row():
                as_json = gr.DownloadButton("Download as JSON", interactive=False, size="sm", elem_id="vc-sweep-json")
                as_png = gr.DownloadButton("Download as PNG", interactive=False, size="sm", elem_id="vc-sweep-png")
        with gr.Column(min_width=300):
            chart = gr.Image(
                label="Accuracy and costs", show_label=False, interactive=False, type="filepath", format="png",
                elem_id="vc-sweep-chart",
                buttons=["download", "fullscreen"], alt_text="accuracy and costs over the budget",
            )  # fmt: skip
    table = gr.HTML(elem_id="vc-sweep-table")

    @told(message)
    def swept(name, chosen, n, model) -> Iterator[dict[Any, Any]]:
        if not chosen:
            raise ValueError("Choose at least one share.")
        loaded = page.pool.get(model)
        yield {table: "", chart: None, as_json: gr.update(interactive=False), as_png: gr.update(interactive=False)}
        points: list[Point] = []
        for point in sweep(loaded, name, int(n), [float(share) for share in chosen]):
            points.append(point)
            yield {table: html.table(HEAD, [cells(p) for p in points])}
        target = page.shelf.path(f"sweep-{name}.png")
        sweep_figure(points, target)
        content = {"schema": "vlmcompress.demo.sweep/1", "model": loaded.label, "points": [p.as_dict() for p in points]}
        yield {
            chart: str(target),
            as_json: gr.update(value=page.shelf.json(f"sweep-{name}.json", content), interactive=True),
            as_png: gr.update(value=str(target), interactive=True),
        }

    go.click(
        swept, [method, shares, questions, page.model], [message, table, chart, as_json, as_png],
        show_progress="minimal", show_progress_on=[table], **MODEL,
    )  # fmt: skip
    page.follow(method, lambda m: gr.update(choices=comparable(m.family), value=first_method(m.family)))
