# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress run``: one picture, one question."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console


def options_of(method: str, keep: str | None, pairs: list[str]) -> dict[str, Any]:
    """Keyword arguments of ``compress`` from the command line; ``ValueError`` in one sentence for a bad one."""
    from ..eval.rows import parse_keep, parse_options
    from ..registry import METHODS

    fields = {f.name for f in dataclasses.fields(METHODS.get(method)) if f.init}
    options: dict[str, Any] = {}
    if keep is not None:
        budget = parse_keep(keep)
        if "keep" in fields:
            options["keep"] = budget
    return options | parse_options(pairs)


def answer_one(
    model_name: str,
    image_path: Path,
    question: str,
    method: str,
    keep: str,
    pairs: list[str],
    out: Path | None,
    max_new_tokens: int | None,
    device: str,
) -> None:
    """Check everything cheap first, then load, answer, print the report and write the overlay."""
    from ..eval.loading import answer, encode, load, open_image
    from ..method import create

    options = options_of(method, keep, pairs)
    create(method, **options)
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
