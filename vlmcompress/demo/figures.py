# SPDX-License-Identifier: Apache-2.0
"""What can be taken away: pictures of a sweep and of a comparison as PNG, everything as JSON."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..eval.chart import COLOURS, FAINT, INK
from .ask import UNCOMPRESSED, Answer, Run
from .sweep import TASK, Point

DPI = 130


class Shelf:
    """Files made for downloading. Each lies in a folder of its own and is gone after ``age`` seconds, or with the shelf."""

    def __init__(self, age: float = 3600):
        self.age = age
        self._folder = tempfile.TemporaryDirectory(prefix="vlmcompress-demo-")

    def path(self, name: str) -> Path:
        """Where a new file called ``name`` may be written; files that are too old leave."""
        for old in Path(self._folder.name).iterdir():
            if time.time() - old.stat().st_mtime > self.age:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(dir=self._folder.name)) / name

    def json(self, name: str, content: Any) -> str:
        """Write ``content``; returns the path."""
        path = self.path(name)
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return str(path)

    def close(self) -> None:
        """Delete everything."""
        self._folder.cleanup()


def run_dict(run: Run) -> dict[str, Any]:
    """A run as JSON: what was asked and, by answer, what was said, what it cost and the tokens that entered."""
    return {
        "schema": "vlmcompress.demo.run/1",
        "model": run.model,
        "question": run.question,
        "image_size": list(run.image.size),
        "positions": run.positions,
        "answers": [_answer_dict(run, answer) for answer in run.answers.values()],
    }


def _answer_dict(run: Run, answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = {"name": answer.name, "methods": run.methods.get(answer.name, {})}
    if answer.error:
        return found | {"error": answer.error}
    return found | {
        "text": answer.text,
        "new_tokens": answer.new_tokens,
        "time_to_first_token_ms": answer.first_ms,
        "prefill_ms": answer.prefill.as_dict() if answer.prefill else None,
        "decode_tokens_per_s": answer.tokens_per_s,
        "report": answer.report.as_dict() if answer.report else None,
        "kept": answer.ledger.samples[0].images[0].kept.tolist() if answer.ledger else None,
    }


def _figure(width: float, height: float) -> Any:
    """A figure of its own canvas: pyplot keeps figures in a global that threads would share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def sweep_figure(points: Sequence[Point], path: Path) -> None:
    """Write accuracy and costs over the budget as PNG; refused budgets are left out."""
    good = [p for p in points if not p.error]
    base = next((p for p in good if p.method == UNCOMPRESSED), None)
    mine = [p for p in good if p.method != UNCOMPRESSED]
    figure = _figure(6.4, 7.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color=FAINT, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(colors=INK, labelsize=11)
    x = [100 * p.share for p in mine]
    if base is not None:
        top.axhspan(100 * base.low, 100 * base.high, color="#000000", alpha=0.06, linewidth=0)
        top.axhline(100 * base.accuracy, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=UNCOMPRESSED)
    if mine:
        y = [100 * p.accuracy for p in mine]
        errors = [[100 * (p.accuracy - p.low) for p in mine], [100 * (p.high - p.accuracy) for p in mine]]
        top.errorbar(x, y, yerr=errors, color=COLOURS[0], marker="o", linewidth=2, elinewidth=1, label=mine[0].method)
    for i, (label, of) in enumerate(_COSTS):
        values = [
            (share, 100 * of(p) / of(base)) for share, p in zip(x, mine, strict=True) if base and of(base) and of(p)
        ]
        if values:
            bottom.plot(*zip(*values, strict=True), color=COLOURS[i + 1], marker="sD^"[i], linewidth=2, label=label)
    top.set_ylim(0, 103)
    top.set_ylabel("accuracy, %", fontsize=11, color=INK)
    asked = base.questions if base else (mine[0].questions if mine else 0)
    top.set_title(f"{TASK}, {asked} questions; bars: 95 % over pictures", loc="left", fontsize=11.5, color=INK)
    bottom.set_title("costs, % of the uncompressed model", loc="left", fontsize=11.5, color=INK)
    bottom.set_ylim(0, 103)
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(x, [f"{share:.3g} %" for share in x])
    bottom.minorticks_off()
    bottom.set_xlabel("budget: share of the visual tokens", fontsize=11, color=INK)
    for axis in (top, bottom):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=10.5)
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)


_COSTS = (
    ("visual tokens, layer average", lambda p: p.layer_tokens),
    ("FLOPs of the prefill", lambda p: p.gflops),
    ("keys and values", lambda p: p.kv_kib),
)


def compare_figure(run: Run, pictures: dict[str, Image.Image], path: Path) -> None:
    """Write the grid of a comparison as PNG: picture, answer and costs of every method that answered."""
    shown = [answer for answer in run.answers.values() if not answer.error]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(3.6 * columns, 4.4 * rows + 0.5)
    # the user's text is no formula, whatever it holds
    figure.suptitle(run.question, x=0.03, ha="left", fontsize=13, color=INK, wrap=True, parse_math=False)
    for axis, answer in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        axis.imshow(pictures.get(answer.name, run.image))
        words = answer.text if len(answer.text) <= 60 else answer.text[:57] + "…"
        axis.set_title(f"{answer.name}\n{words}", fontsize=11, loc="left", color=INK, parse_math=False)
        if answer.report is not None:
            axis.set_xlabel(
                f"{answer.report.tokens} tokens in, layer average {answer.report.layer_averaged_tokens:.1f}", color=INK
            )
    for axis in figure.axes:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=DPI)
