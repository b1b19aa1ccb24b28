# SPDX-License-Identifier: Apache-2.0
"""What the tabs share: the page's belongings, the picture that is uploaded, sentences instead of tracebacks."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from . import html
from .ask import STEPS, share, takes_budget, tokens_at, visual_tokens
from .figures import Shelf
from .images import open_upload
from .models import Loaded, Pool

#: events that run the model wait for each other, whoever sent them
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
#: loading does not hold up those who ask a model that is there
LOADING = {"concurrency_id": "loading", "concurrency_limit": 1}
SILENT: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
START = STEPS - 8  # a quarter of the tokens


def upload_box(elem_id: str) -> gr.Image:
    """A picture to upload; events get its path as it is, so that :func:`~.images.open_upload` is the only decoder."""
    image = gr.Image(
        label="Picture", type="filepath", sources=["upload", "clipboard"], height=260, elem_id=elem_id, buttons=[]
    )
    image.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return image


@dataclass
class Page:
    """What every tab needs; ``model`` is the name of the session's model, ``followers`` what changes with it."""

    pool: Pool
    shelf: Shelf
    results: Path
    first: Loaded
    model: gr.State
    followers: list[tuple[Any, Callable[[Loaded], Any]]] = field(default_factory=list)

    def follow(self, component: Any, update: Callable[[Loaded], Any]) -> None:
        """Set ``component`` to ``update(model)`` whenever the session loads another model."""
        self.followers.append((component, update))


def told(message: Any) -> Callable[[Callable[..., Iterator[dict]]], Callable[..., Iterator[dict]]]:
    """Decorate an event's generator of updates: what it raises becomes one sentence in ``message``."""

    def decorate(event: Callable[..., Iterator[dict]]) -> Callable[..., Iterator[dict]]:
        @functools.wraps(event)
        def run(*args: Any) -> Iterator[dict]:
            yield {message: ""}
            try:
                yield from event(*args)
            except ValueError as error:
                yield {message: html.sentence(" ".join(str(error).split()))}
            except Exception as error:  # the page stays usable; the traceback is for whoever started it
                logging.getLogger(__name__).exception("An event of the page failed.")
                yield {message: html.sentence(f"That did not work: {type(error).__name__}, {error}"[:400])}

        return run

    return decorate


def opened(path: str | None) -> Any:
    """The uploaded picture. Raises ``ValueError`` in one sentence, also where none was uploaded."""
    if not path:
        raise ValueError("Choose a picture first.")
    return open_upload(path)[0]


def budget_slider(elem_id: str) -> tuple[gr.Slider, gr.HTML]:
    """A slider of steps on a log scale, and the words that say what a step means."""
    slider = gr.Slider(0, STEPS, value=START, step=1, label="Budget", elem_id=elem_id, buttons=[])
    return slider, gr.HTML(html.budget(share(START), None, None), elem_id=f"{elem_id}-words")


def words_of(step: float, n: int | None, method: str | None = None) -> str:
    """The words under a budget slider."""
    used = method is None or takes_budget(method)
    return html.budget(share(step), None if n is None else tokens_at(step, n), n, used)


def looked_at(page: Page, path: str | None, name: str) -> tuple[int | None, str]:
    """Visual tokens of an uploaded picture for a model, and a sentence on what was done to it, or on what is wrong."""
    if not path:
        return None, ""
    try:
        image, notes = open_upload(path)
        return visual_tokens(page.pool.get(name), image), html.sentence(" ".join(notes), "note")
    except ValueError as error:
        return None, html.sentence(str(error))
