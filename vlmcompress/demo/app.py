# SPDX-License-Identifier: Apache-2.0
"""The page: its head, the model it talks to, the tabs, and the server.

Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, bound to 127.0.0.1 unless ``share`` is
asked for. Sessions share loaded models but neither states nor handles.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from . import html, tab_ask, tab_compare, tab_sweep, tab_table
from .figures import Shelf
from .images import MAX_BYTES
from .models import RESULTS, Pool, shipped
from .parts import LOADING, Page, told

#: seconds: how often files of sessions are looked through, and how old they get
CLEANING = (600, 3600)
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
HEAD = """<div class="vc-head"><h1>vlmcompress</h1>
<p>What a method keeps of the visual tokens, what it costs, and what it changes.</p></div>"""


def build(pool: Pool, model: str, shelf: Shelf, results: Path = RESULTS) -> gr.Blocks:
    """The page for a pool of models, beginning with ``model``. Raises ``ValueError`` where that cannot be loaded."""
    first = pool.get(model)
    with gr.Blocks(title="vlmcompress", analytics_enabled=False, delete_cache=CLEANING, fill_width=True) as blocks:
        page = Page(pool, shelf, results, first, gr.State(model))
        gr.HTML(HEAD)
        with gr.Accordion("Model", open=False, elem_id="vc-model"):
            name = gr.Dropdown(
                list(dict.fromkeys([model, *shipped()])), value=model, allow_custom_value=True,
                label="Folder on this machine, or hub id", elem_id="vc-model-name",
            )  # fmt: skip
            load = gr.Button("Load", elem_id="vc-model-load")
            message = gr.HTML(elem_id="vc-model-message")
        current = gr.HTML(tab_ask.load_label(first), elem_id="vc-model-current")
        for title, tab in (("Ask", tab_ask), ("Compare", tab_compare), ("Sweep", tab_sweep), ("Results", tab_table)):
            with gr.Tab(title):
                tab.build(page)
        _connect_loading(page, name, load, message, current)
    return blocks


def _connect_loading(page: Page, name: gr.Dropdown, load: gr.Button, message: gr.HTML, current: gr.HTML) -> None:
    @told(message)
    def loading(wanted: str, progress: gr.Progress = gr.Progress(track_tqdm=True)) -> Iterator[dict[Any, Any]]:
        wanted = (wanted or "").strip()
        yield {message: html.sentence(f"Loading {wanted} …", "note"), load: gr.update(interactive=False)}
        try:
            loaded = page.pool.get(wanted)
            changed = {component: update(loaded) for component, update in page.followers}
            yield {message: "", page.model: wanted, current: tab_ask.load_label(loaded), **changed}
        finally:
            yield {load: gr.update(interactive=True)}

    followers = [component for component, _ in page.followers]
    load.click(
        loading, name, [message, load, page.model, current, *followers], show_progress="full", show_progress_on=[current],
        **LOADING,
    )  # fmt: skip


def theme() -> gr.themes.Base:
    """Fonts that every system has, and grey that can be read."""
    base = gr.themes.Base(primary_hue="blue", font=FONTS, font_mono=["ui-monospace", "monospace"])
    return base.set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_label_text_color="*neutral_600", block_title_text_color="*neutral_700", block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
    )  # fmt: skip


def serve(
    model: str, *, port: int | None = None, device: str = "cpu", share: bool = False, results: Path = RESULTS,
    block: bool = True,
) -> tuple[gr.Blocks, str]:  # fmt: skip
    """Start the page; returns it and its address, at once or (``block``) when it has been stopped.

    ``port``: None takes the first free one from 7860 on. ``share``: open a public address through gradio's servers.
    Raises ``ValueError`` where the model cannot be loaded and ``OSError`` where the port is taken.
    """
    shelf = Shelf()
    blocks = build(Pool(device), model, shelf, results).queue(api_open=False, max_size=32)
    try:
        _, address, _ = blocks.launch(
            server_name="127.0.0.1", server_port=port, share=share, prevent_thread_lock=not block, quiet=not block,
            ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], run_history=False,
            max_file_size=MAX_BYTES, allowed_paths=[], css_paths=[Path(__file__).with_name("style.css")],
            theme=theme(),
        )  # fmt: skip
    finally:
        if block:
            shelf.close()
    return blocks, address
