# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress run``: one picture, one question."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

#: share of the visual tokens where no budget is given
SHARE = 0.25


def options_of(method: str, keep: str | None, pairs: list[str], default: float | None = None) -> dict[str, Any]:
    """Keyword arguments of ``compress`` from the command line; ``ValueError`` in one sentence for a bad one.

    ``default``: the budget of methods that take one, where none is given; one that has options for a budget of its own
    (its ``keep`` is None) goes by the options that were given.
    """
    from ..eval.rows import parse_keep, parse_options
    from ..method import create
    from ..registry import METHODS

    fields = {f.name: f for f in dataclasses.fields(METHODS.get(method)) if f.init}
    options = parse_options(pairs)
    if keep is not None and "keep" in options:
        raise ValueError("The budget is given twice, by --keep and by --option; one is enough.")
    if keep is not None:
        options["keep"] = parse_keep(keep)
    elif default is not None and "keep" in fields and not (options and fields["keep"].default is None):
        options = {"keep": default} | options
    create(method, **options)
    return options


def answer_one(
    model_name: str,
    image_path: Path,
    question: str,
    method: str,
    keep: str | None,
    pairs: list[str],
    out: Path | None,
    max_new_tokens: int | None,
    device: str,
) -> None:
    """Check everything cheap first, then load, answer, print the report and write the overlay."""
    from ..eval.loading import answer, encode, load, open_image

    options = options_of(method, keep, pairs, SHARE)
    if not question.strip():
        raise ValueError("The question is empty.")
    image = open_image(image_path)
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"There is no folder '{out.parent}' to write {out.name} to.")
    model, processor = load(model_name, device=device)

    from ..attach import compress
    from ..eval.overlay import overlay

    with compress(model, method, **options) as handle:
        inputs = encode(model, processor, [image], [question])
        length = max_new_tokens or model.generation_config.max_new_tokens or 64
        text = answer(model, processor, inputs, length)[0]
        console = Console()
        console.print(text, style="bold", markup=False, highlight=False)
        console.print(handle.report())
        if out is not None:
            record = handle.last.samples[0].images[0]
            overlay(image, record, inputs.get("pixel_values"), processor).save(out, format="PNG")
            console.print(f"Kept patches: {out}", highlight=False)
