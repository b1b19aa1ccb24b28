# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress flops``: what a method saves on an architecture of true size, without its weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

SCHEMA = "vlmcompress.flops/1"


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    model: str
    method: str
    keep: str | None
    options: list[str]
    image: str
    text: int
    json: Path | None


def flops(settings: Settings) -> dict[str, Any]:
    """Count, print, and write the numbers as JSON where asked for."""
    from ..eval import truesize
    from ..eval.presets import load_config
    from .run import options_of

    size = image_size(settings.image)
    options = options_of(settings.method, settings.keep, settings.options)
    config = load_config(settings.model)
    found = truesize.count(config, settings.method, options, image=size, text_tokens=settings.text)
    report = {
        "schema": SCHEMA,
        "model": settings.model,
        "parameters": found.parameters,
        "method": settings.method,
        "options": options,
        "image": {"height": size[0], "width": size[1]},
        "text_tokens": found.text_tokens,
        "varies": found.varies,
        "uncompressed": found.uncompressed.as_dict(),
        "compressed": found.compressed.as_dict(),
    }
    Console().print(_table(report))
    if found.varies:
        Console().print("How many tokens stay depends on the picture here; these are the numbers of one of noise.")
    if settings.json is not None:
        from ..eval.store import write_json

        write_json(settings.json, report)
        Console().print(f"Written: {settings.json}", highlight=False)
    return report


def image_size(text: str) -> tuple[int, int]:
    """``"672x336"`` (width × height, as cameras say it) → (height, width); ``ValueError`` otherwise."""
    match = re.fullmatch(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", text.strip())
    if not match or "0" in match.groups():
        raise ValueError(f"The image size is WIDTHxHEIGHT in pixels, such as 672x672, not '{text}'.")
    return int(match[2]), int(match[1])


def _table(report: dict[str, Any]) -> Table:
    before, after = report["uncompressed"], report["compressed"]
    pixels = "{width} × {height}".format(**report["image"])
    options = ", ".join(f"{k}={v}" for k, v in report["options"].items())
    table = Table(
        title=f"{report['model']} ({report['parameters'] / 1e9:.2f} B), {report['method']} {options}, one image of "
        f"{pixels} px, {report['text_tokens']} text tokens",
        box=box.SIMPLE_HEAD,
    )
    for name in ("", "uncompressed", "compressed", "share"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def row(label: str, a: float, b: float, unit: float = 1e12, form: str = ",.3f", **style: Any) -> None:
        table.add_row(label, f"{a / unit:{form}}", f"{b / unit:{form}}", f"{b / a:.1%}" if a else "", **style)

    tokens = before["visual_tokens"], after["visual_tokens"]
    row("visual tokens, first decoder layer", tokens[0][0], tokens[1][0], 1, ",.0f")
    row("visual tokens, layer average", *(sum(t) / len(t) for t in tokens), 1, ",.1f", end_section=True)
    for part in ("tower", "projector", "compressor"):
        row(f"{part}, TFLOPs", before[part], after[part], form=",.4f")
    for first, last in _same(tokens[1]):
        span = f"layer {first}" if first == last else f"layers {first}–{last}"
        row(f"decoder {span}, TFLOPs", *(sum(it["decoder"][first : last + 1]) for it in (before, after)))
    row("lm_head, TFLOPs", before["lm_head"], after["lm_head"], form=",.4f")
    row("prefill in all (full), TFLOPs", before["full"], after["full"], end_section=True)
    row("visual tokens only (macs), TMACs", before["macs"], after["macs"])
    row("visual tokens only (flops), TFLOPs", before["flops"], after["flops"], end_section=True)
    row("one decoded token, GFLOPs", before["decode_step"], after["decode_step"], 1e9, ",.2f")
    row("KV cache, MB", sum(before["kv_bytes"]), sum(after["kv_bytes"]), 1e6, ",.1f")
    return table


def _same(tokens: list[int]) -> list[tuple[int, int]]:
    """First and last index of every run of equal numbers."""
    starts = [i for i, n in enumerate(tokens) if i == 0 or n != tokens[i - 1]]
    return [(a, b - 1) for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)]
