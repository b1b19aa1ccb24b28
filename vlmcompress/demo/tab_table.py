# SPDX-License-Identifier: Apache-2.0
"""The fourth tab: what has been measured and committed."""

from __future__ import annotations

import gradio as gr

from . import html, leaderboard
from .parts import SILENT, Page

NOTHING = "There are no results here; `vlmcompress demo --results FOLDER` reads the reports of another folder."


def build(page: Page) -> None:
    """Put the tab's components on the page and connect them."""
    lines = leaderboard.read(page.results)
    if not lines:
        gr.HTML(html.sentence(NOTHING, "note"), elem_id="vc-table")
        return
    values = leaderboard.choices(lines)

    def shown(model: str, task: str, keep: str, order: str) -> str:
        rows, commands = leaderboard.select(lines, model, task, keep, order)
        return html.table(leaderboard.HEAD, rows, commands)

    gr.HTML(
        html.sentence(
            "A click on a method opens the command that measures its row; rows without a budget always stay.", "note"
        )
    )
    with gr.Row():
        filters = [
            gr.Dropdown(values[name], value=leaderboard.ALL, label=label, elem_id=f"vc-table-{name}", min_width=140)
            for name, label in (("model", "Model"), ("task", "Task"), ("keep", "Tokens kept"))
        ]
        order = gr.Dropdown(list(leaderboard.ORDERS), value="accuracy", label="Sorted by", elem_id="vc-table-order",
                            min_width=140)  # fmt: skip
    table = gr.HTML(shown(leaderboard.ALL, leaderboard.ALL, leaderboard.ALL, "accuracy"), elem_id="vc-table")
    gr.on([c.change for c in (*filters, order)], shown, [*filters, order], table, **SILENT)
