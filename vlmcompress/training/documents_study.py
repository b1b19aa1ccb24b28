# SPDX-License-Identifier: Apache-2.0
"""What becomes of text and blank paper: ``python -m vlmcompress.training.documents_study MODEL --out results/NAME``.

Every method runs on the test set of documents at the number of tokens that token-level correlation chooses for each page,
which depends on the page. Besides right answers it is told how much of a page is kept, dense or mostly blank, how much of
the text, and how many of the kept tokens lie on text. "ink" is the plain rule that a reviewer of the paper suspected to be
as good: of every crop the tokens whose pixels vary most.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import typer
from torch import Tensor

from ..attach import compress
from ..eval import results
from ..eval.loading import answer, encode_chats, fingerprint, load
from ..eval.store import write_json
from ..eval.tasks import Sample
from ..eval.tasks import load as load_task
from ..ledger import ImageRecord
from ..method import Method, Stage, check_keep, create
from ..views import EntryTokens, Selection
from .documents import SEED, make_page, text_cells


@dataclass(frozen=True)
class Ink(Method):
    """The tokens whose pixels vary most enter; the thumbnail passes whole."""

    keep: int | float = 0.5

    name: ClassVar[str] = "ink"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def validate(self) -> None:
        check_keep(self.keep)

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        layout, pixels = tokens.layout, tokens.pixel_values
        assert pixels is not None and layout.thumbnail is not None
        rows, columns = layout.view_grid
        views = pixels.flatten(0, 1)[: len(layout.view_image)] if pixels.ndim == 5 else pixels
        cells = views.float().unflatten(3, (columns, -1)).unflatten(2, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
        varies = cells.flatten(3).std(3).flatten(1)
        varies = varies.masked_fill(layout.thumbnail[:, None], torch.inf)
        return tokens.select(tokens.of_views(varies, fill=-torch.inf), self.keep, pooled=True)


#: what stands beside token-level correlation, each made for a share of a page's tokens
BESIDE = {
    "ink": lambda keep: Ink(keep),
    "random": lambda keep: create("random", keep=keep, seed=0).methods[0],
    "grid": lambda keep: create("grid", keep=keep).methods[0],
    "vtc-cls": lambda keep: create("vtc-cls", keep=keep).methods[0],
}


def on_text(record: ImageRecord, index: int) -> tuple[Tensor, Tensor]:
    """([n] bool, [n] bool): tokens of the page's crops, and those among them that show text of page ``index``."""
    crop = (record.views != record.views.min()) & ~record.is_newline
    cells = torch.from_numpy(text_cells(make_page(SEED, index), *record.grid))
    text = torch.zeros(record.n_original, dtype=torch.bool)
    text[crop] = cells[record.rows[crop], record.cols[crop]]
    return crop, text


def look(model: Any, processor: Any, samples: list[Sample], method: Method) -> list[dict[str, Any]]:
    """One line per question: whether it is right, and where the tokens of its page went."""
    found = []
    with compress(model, method) as handle:
        for sample in samples:  # one at a time: the budget is the page's
            inputs = encode_chats(model, processor, [sample.chat()])
            (said,) = answer(model, processor, inputs, 4)
            (record,) = handle.last.samples[0].images
            _, kind, index = sample.id.split("-")[:3]
            crop, text = on_text(record, int(index))
            kept = torch.zeros(record.n_original, dtype=torch.bool)
            kept[record.kept] = True
            found.append({
                "page": kind, "kind": sample.kind, "right": sample.mark(said)["correct"],
                "kept": len(record.kept), "of": record.n_original, "text": int(text.sum()),
                "text_kept": int((kept & text).sum()), "crop_kept": int((kept & crop).sum()),
                "patches": int((kept & ~record.is_newline).sum()),
            })  # fmt: skip
    return found


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the questions, in all and per sort of page and question."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        for name in ("all", line["page"], line["kind"]):
            groups[name].append(line)
    return {
        name: {
            "questions": len(group),
            "right": float(np.mean([line["right"] for line in group])),
            "kept": sum(line["kept"] for line in group) / sum(line["of"] for line in group),
            "text_kept": sum(line["text_kept"] for line in group) / max(1, sum(line["text"] for line in group)),
            "on_text": sum(line["text_kept"] for line in group) / max(1, sum(line["crop_kept"] for line in group)),
        }
        for name, group in groups.items()
    }


def study(name: str, limit: int | None) -> dict[str, Any]:
    """The rows, by name."""
    model, processor = load(name)
    samples = load_task("documents", limit=limit)
    rows = {"uncompressed": summary(look(model, processor, samples, create("none").methods[0]))}
    chosen = look(model, processor, samples, create("token-correlation").methods[0])
    rows["token-correlation"] = summary(chosen)
    for beside, made in BESIDE.items():
        lines = []
        for sample, line in zip(samples, chosen, strict=True):
            lines += look(model, processor, [sample], made(line["patches"]))
        rows[beside] = summary(lines)
    return rows


def markdown(report: dict[str, Any]) -> str:
    """A table of all rows."""
    lines = [f"# Documents on {report['model']['name']}", "", f"`{report['command']}`", ""]
    lines += [
        "| % | right | reading | kept, dense | kept, blank | of the text | of crops' tokens on text |",
        "|---" * 7 + "|",
    ]
    for name, row in report["rows"].items():
        cells = [
            row["all"]["right"], row["digit"]["right"], row["dense"]["kept"], row["blank"]["kept"],
            row["all"]["text_kept"], row["all"]["on_text"],
        ]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(f"{100 * cell:.1f}" for cell in cells) + " |")
    return "\n".join([*lines, "", f"{report['rows']['uncompressed']['all']['questions']} questions."]) + "\n"


def main(
    name: str,
    out: Annotated[Path, typer.Option(help="Folder of study.json and report.md.")],
    limit: Annotated[int, typer.Option(min=0, help="Questions; 0: all.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads for torch.")] = None,
) -> None:
    """Measure and write the report."""
    if threads is not None:
        torch.set_num_threads(threads)
    report = {
        "schema": "vlmcompress.documents/1",
        "command": f"python -m vlmcompress.training.documents_study {name} --out {out} --limit {limit}",
        "model": {"name": Path(name).name, "fingerprint": fingerprint(name)},
        "environment": results.environment("cpu"),
        "rows": study(name, limit or None),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", report)
    (out / "report.md").write_text(markdown(report))
    typer.echo(markdown(report))


if __name__ == "__main__":
    typer.run(main)
