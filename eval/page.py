# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page from folders of results: frontiers, tables, token profiles, kept patches."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import chart, table
from .results import load_report
from .rows import UNCOMPRESSED, Row
from .tasks import Sample
from .tasks import load as load_task


@dataclass(frozen=True)
class View:
    """One row's answer to one question, with the picture of what it kept."""

    method: str
    picture: Image.Image
    tokens: int
    layer_tokens: tuple[int, ...]
    prediction: str
    correct: bool


@dataclass(frozen=True)
class Disagreement:
    """A question that rows of one budget answered differently."""

    task: str
    sample: Sample
    views: tuple[View, ...]


def write(folders: Sequence[Path], out: Path, *, model: str | None = None, samples: int = 4) -> list[Path]:
    """Write the page ``out`` and its charts as PNG files beside it; returns all paths.

    ``folders``: what ``vlmcompress eval --out`` filled. With ``model``, the folder that was measured, up to ``samples``
    questions on which the methods disagree are put to it again to draw what each method kept. Raises ``ValueError`` in
    one sentence for a folder without results and for a model that is not the measured one.
    """
    from importlib.resources import files

    from jinja2 import Environment

    import vlmcompress

    written = [out]
    parts = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        report = read(folder)
        found = disagreements(folder, report, model, samples) if model else []
        figures = []
        for name, caption, draw in _charts(report, found):
            path = out.with_name(f"{out.stem}-{folder.name}-{name}.png")
            draw(path)
            written.append(path)
            figures.append({"data": _embedded(path.read_bytes()), "caption": caption})
        parts.append(_part(folder, report, figures, found))
    template = Environment(autoescape=True).from_string((files(__package__) / "templates/report.html.j2").read_text())
    title = "Visual-token compression: " + ", ".join(dict.fromkeys(p["model"] for p in parts))
    out.write_text(template.render(title=title, version=vlmcompress.__version__, parts=parts))
    return written


def read(folder: Path) -> dict[str, Any]:
    """The report of one folder of results."""
    path = folder / "report.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no report.json; `vlmcompress eval … --out {folder}` writes one.")
    return load_report(path)


def _charts(report: dict[str, Any], found: Sequence[Disagreement]) -> list[tuple[str, str, Any]]:
    charts = [("flops", "Accuracy against the FLOPs of one prefill", lambda p: chart.frontier(report, p))]
    if any(row.get("timing") for row in report["rows"]):
        caption = "Accuracy against the measured time of one prefill"
        charts.append(("latency", caption, lambda p: chart.frontier(report, p, chart.PREFILL_MS)))
    if found:
        profiles = {view.method: view.layer_tokens for view in found[0].views}
        caption = "Visual tokens that each decoder layer processes, for the first question below"
        charts.append(("layers", caption, lambda p: chart.layer_profile(profiles, p)))
    return charts


def _part(folder: Path, report: dict[str, Any], figures: list[dict], found: Sequence[Disagreement]) -> dict[str, Any]:
    tasks, before, rows = list(report["settings"]["tasks"]), None, []
    for row in report["rows"]:
        classes = ["first"] * (row["method"] != before) + ["failed"] * ("tasks" not in row)
        rows.append({"cells": table.cells(row, tasks), "classes": " ".join(classes)})
        before = row["method"]
    return {
        "name": folder.name,
        "source": f"{folder.name}/report.json",
        "model": report["model"]["name"],
        "parameters": report["model"]["parameters"],
        "dtype": report["model"]["dtype"].removeprefix("torch."),
        "figures": figures,
        "head": table.header(report),
        "rows": rows,
        "notes": table.notes(report),
        "budget": _budget(report),
        "samples": [
            {
                "question": it.sample.question,
                "answer": it.sample.answer,
                "task": it.task,
                "views": [vars(view) | {"data": _embedded(_png(view.picture))} for view in it.views],
            }
            for it in found
        ],
    }


def _budget(report: dict[str, Any]) -> int | float | None:
    """The smallest budget of the table: there methods differ most."""
    keeps = [row["keep"] for row in report["rows"] if row["keep"] is not None and "tasks" in row]
    return min(keeps, default=None)


def disagreements(folder: Path, report: dict[str, Any], model: str, samples: int) -> list[Disagreement]:
    """Questions on which the rows at the smallest budget disagree most evenly, asked again to see what was kept."""
    from .loading import fingerprint, load

    if fingerprint(model) != report["model"]["fingerprint"]:
        raise ValueError(f"{folder} was not measured with the model '{model}': its fingerprint is another one.")
    rows = [r for r in report["rows"] if r["keep"] == _budget(report) and "tasks" in r]
    right: dict[tuple[str, str], list[bool]] = {}
    for row in rows:
        run = Row(row["method"], row["keep"], tuple(row["seeds"]) or (None,), row["options"])
        path = folder / "answers" / f"{run.run_key(run.seeds[0])}.jsonl"
        if not path.is_file():
            raise ValueError(f"{folder} holds no answers of {run.key}; without them no disagreement can be shown.")
        for line in map(json.loads, path.read_text().splitlines()):
            right.setdefault((line["task"], line["id"]), []).append(bool(line["correct"]))
    split = {key: min(sum(marks), len(marks) - sum(marks)) for key, marks in right.items()}
    # stable: among equally divided questions the order of the task
    chosen = [key for key in sorted(split, key=lambda k: -split[k]) if split[key]][:samples]
    if not chosen:
        return []
    known = {task: {s.id: s for s in load_task(task)} for task in {task for task, _ in chosen}}
    loaded, processor = load(model)
    return [
        Disagreement(task, known[task][name], _views(loaded, processor, known[task][name], rows))
        for task, name in chosen
    ]


def _views(model: Any, processor: Any, sample: Sample, rows: Sequence[dict[str, Any]]) -> tuple[View, ...]:
    import vlmcompress

    from .loading import answer, encode_chats
    from .overlay import overlay

    views = []
    inputs = encode_chats(model, processor, [sample.chat()])
    for row in rows:
        if row["method"] == UNCOMPRESSED or not isinstance(sample.image, Image.Image):
            continue
        run = Row(row["method"], row["keep"], tuple(row["seeds"]) or (None,), row["options"])
        with vlmcompress.compress(model, run.method, **run.arguments(run.seeds[0])) as handle, torch.inference_mode():
            (prediction,) = answer(model, processor, inputs, sample.max_new_tokens or 4, list(sample.until))
            ledger = handle.last
            image = ledger.samples[0].images[0]
            picture = overlay(sample.image, image, inputs.get("pixel_values"), processor)
            correct = bool(sample.mark(prediction)["correct"])
            views.append(View(run.method, picture, len(image.kept), tuple(ledger.layer_tokens), prediction, correct))
    return tuple(views)


def _png(picture: Image.Image) -> bytes:
    picture.thumbnail((360, 360))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _embedded(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
