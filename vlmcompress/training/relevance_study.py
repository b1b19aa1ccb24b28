# SPDX-License-Identifier: Apache-2.0
"""What a relevance predictor is worth: accuracy with the true relevance, the net, the map it reads, and what it replaces.

``python -m vlmcompress.training.relevance_study assets/models/tiny-llava --out results/NAME``: every row answers the same
questions at the same budgets. The oracle ranks by the relevance of the model's own uncompressed answer, which takes that
answer and its gradient; it is an upper end, not a method. FastV's budget is what leaves its second layer: the layers before
see everything, so it costs more than the others at the same number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..attach import compress
from ..eval import results
from ..eval.loading import answer, encode_chats, fingerprint, load
from ..eval.store import write_json
from ..eval.tasks import Sample
from ..eval.tasks import load as load_task
from ..method import Method, Stage, create
from ..views import EntryTokens, Selection
from .explainability import RelevanceRecipe, explain

#: how each row is made at a budget; None: with the true relevance
ROWS: dict[str, Any] = {
    "oracle": None,
    "explainability": lambda keep: create("explainability", keep=keep).methods[0],
    "map itself": lambda keep: create("explainability", keep=keep, predictor="identity").methods[0],
    "fastv": lambda keep: create("fastv", keep=keep).methods[0],
    "vtc-cls": lambda keep: create("vtc-cls", keep=keep).methods[0],
    "random": lambda keep: create("random", keep=keep, seed=0).methods[0],
}


@dataclass(frozen=True, eq=False)
class Ranked(Method):
    """The tokens with the largest given ``scores`` [I, n_max] enter."""

    keep: int = 1
    scores: Tensor = field(default_factory=lambda: torch.zeros(1, 1))

    name: ClassVar[str] = "ranked"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        return tokens.select(self.scores, self.keep)

    def options(self) -> dict[str, Any]:
        return {}


def study(name: str, tasks: dict[str, int | None], keeps: Sequence[int], batch: int = 50) -> dict[str, Any]:
    """Share of right answers per task, row and budget, and the layer average of visual tokens per image."""
    model, processor = load(name, attn_implementation="eager")
    model.requires_grad_(False)
    fused, _ = load(name)
    found: dict[str, Any] = {}
    for task, limit in tasks.items():
        samples = load_task(task, limit=limit)
        explained = {e.sample.id: e for e in explain(model, processor, samples, RelevanceRecipe(name))}
        # a model that answers with nothing has no relevance; its question is wrong in every row
        samples = [sample for sample in samples if sample.id in explained]
        rows = {"uncompressed": {"right": sum(e.right for e in explained.values()) / len(samples)}}
        for row, made in ROWS.items():
            for keep in keeps:
                rows[f"{row} {keep}"] = _accuracy(fused, processor, samples, explained, made, keep, batch)
        found[task] = {"questions": len(samples), "rows": rows}
    return found


def _accuracy(
    model: Any, processor: Any, samples: list[Sample], explained: dict, made: Any, keep: int, batch: int
) -> dict[str, float]:
    right = tokens = 0.0
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        relevance = pad_sequence([explained[sample.id].relevance for sample in part], batch_first=True)
        method = Ranked(keep, relevance) if made is None else made(keep)
        with compress(model, method) as handle:
            texts = answer(model, processor, encode_chats(model, processor, [s.chat() for s in part]), 4)
            layers = handle.last.layer_tokens
        tokens += sum(layers) / len(layers)
        right += sum(sample.mark(text)["correct"] for sample, text in zip(part, texts, strict=True))
    return {"right": right / len(samples), "layer_average": tokens / len(samples)}


def markdown(report: dict[str, Any]) -> str:
    """One table per task."""
    lines = [f"# Relevance on {report['model']['name']}", "", f"`{report['command']}`"]
    for task, found in report["tasks"].items():
        keeps = report["keeps"]
        lines += ["", f"{task}, {found['questions']} questions, % right (layer average of visual tokens)", ""]
        lines += ["| | " + " | ".join(f"{keep} tokens" for keep in keeps) + " |", "|---" * (len(keeps) + 1) + "|"]
        whole = f"{100 * found['rows']['uncompressed']['right']:.1f}"
        lines.append("| uncompressed | " + " | ".join([whole] * len(keeps)) + " |")
        for row in ROWS:
            cells = [found["rows"][f"{row} {keep}"] for keep in keeps]
            shown = [f"{100 * cell['right']:.1f} ({cell['layer_average']:.0f})" for cell in cells]
            lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(
    name: str,
    out: Annotated[Path, typer.Option(help="Folder of study.json and report.md.")],
    tasks: Annotated[str, typer.Option(help="Task names.")] = "scenes,easy-vqa",
    limit: Annotated[int, typer.Option(min=0, help="Questions per task; 0: all.")] = 600,
    keep: Annotated[str, typer.Option(help="Budgets.")] = "48,32,16",
    threads: Annotated[int | None, typer.Option(help="CPU threads for torch.")] = None,
) -> None:
    """Measure and write the report."""
    if threads is not None:
        torch.set_num_threads(threads)
    keeps = [int(number) for number in keep.split(",")]
    report = {
        "schema": "vlmcompress.relevance/1",
        "command": f"python -m vlmcompress.training.relevance_study {name} --out {out} --tasks {tasks} --limit {limit} "
        f"--keep {keep}",
        "model": {"name": Path(name).name, "fingerprint": fingerprint(name)},
        "environment": results.environment("cpu"),
        "keeps": keeps,
        "tasks": study(name, dict.fromkeys(tasks.split(","), limit or None), keeps),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", report)
    (out / "report.md").write_text(markdown(report))
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
