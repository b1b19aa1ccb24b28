# SPDX-License-Identifier: Apache-2.0
"""What a choice of tokens does with things and with the empty ground between them.

``python -m vlmcompress.eval.ground MODEL --task easy-vqa --keep 16 --out FILE.json`` compares VTC-CLS, random choice and
their mixture (the best patches by CLS attention, the rest of the budget at random): how much of what is kept lies on
things, how much of the things is kept, and which kinds of questions are answered. A patch belongs to a thing when one of
its pixels differs from the picture's ground, the median of its border, by more than 24 of 256 levels.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor

from ..attach import compress
from ..method import Method, create
from ..methods.vtc_cls import VtcCls
from ..ops.select import top_indices
from ..views import EntryTokens, Selection
from .loading import answer, encode, load
from .results import environment
from .store import write_json
from .tasks import Sample, score
from .tasks import load as load_task

LEVELS = 24


@dataclass(frozen=True)
class Mixed(VtcCls):
    """The ``best`` patches of VTC-CLS, and the rest of the budget drawn at random from the others."""

    best: int = 8
    seed: int = 0

    name: ClassVar[str] = "mixed"

    def entry(self, tokens: EntryTokens, state: dict) -> Selection:
        attention = tokens.of_views(state.pop("sum"))
        first = attention.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < self.best
        drawn = torch.rand(attention.shape, generator=torch.Generator().manual_seed(self.seed))
        counts = tokens.budgets(self.keep)
        return Selection(top_indices(torch.where(first, 2.0, drawn), counts), counts)


def things(image: Image.Image, grid: tuple[int, int]) -> Tensor:
    """[rows · columns] bool: patches that hold a pixel unlike the ground."""
    pixels = np.asarray(image).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    unlike = np.abs(pixels - np.median(border, axis=0)).max(-1) > LEVELS
    rows, columns = (np.linspace(0, n, parts + 1).astype(int) for n, parts in zip(unlike.shape, grid, strict=True))
    found = [
        [unlike[rows[i] : rows[i + 1], columns[j] : columns[j + 1]].any() for j in range(grid[1])]
        for i in range(grid[0])
    ]
    return torch.tensor(found).flatten()


def look(model: Any, processor: Any, samples: list[Sample], method: Method, batch_size: int = 64) -> dict[str, Any]:
    """Where one method's tokens lie and what is answered, over all samples."""
    right: dict[str, list[bool]] = defaultdict(list)
    on_things, covered, nothing = [], [], []
    with compress(model, method) as handle:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            inputs = encode(model, processor, [s.image for s in batch], [s.question for s in batch])
            predictions = answer(model, processor, inputs, 4)
            for sample, said, record in zip(batch, predictions, handle.last.samples, strict=True):
                kind = f"{sample.kind}, {sample.answer}" if sample.kind == "existence" else sample.kind
                right[kind].append(score(said, sample.answer))
                (image,) = record.images
                thing, kept = things(sample.image, image.grid), image.kept
                on_things.append(float(thing[kept].float().mean()))
                covered.append(float(thing[kept].sum() / thing.sum().clamp_min(1)))
                nothing.append(float((~thing).float().mean()))
    everything = [value for values in right.values() for value in values]
    return {
        "method": method.name,
        "options": method.options(),
        "kept_on_things": float(np.mean(on_things)),
        "things_kept": float(np.mean(covered)),
        "ground_of_picture": float(np.mean(nothing)),
        "accuracy": float(np.mean(everything)),
        "by_kind": {kind: float(np.mean(values)) for kind, values in sorted(right.items())},
    }


def main(
    model: str,
    task: str = "easy-vqa",
    keep: int = 16,
    limit: Annotated[int, typer.Option(min=1)] = 1000,
    out: Path = Path("ground.json"),
) -> None:
    """Compare VTC-CLS, random choice and mixtures of both on one task, and write what was found."""
    loaded, processor = load(model)
    samples = load_task(task, limit=limit)
    chosen = [create("vtc-cls", keep=keep).methods[0], create("random", keep=keep).methods[0]]
    chosen[1:1] = [Mixed(keep=keep, best=keep * part // 4) for part in (3, 2, 1)]
    found = []
    for method in chosen:
        found.append(look(loaded, processor, samples, method))
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in found[-1]["by_kind"].items())
        label = f"{method.name} ({method.best} best)" if isinstance(method, Mixed) else method.name
        print(f"{label}: {found[-1]['accuracy']:.1%} ({kinds}); {found[-1]['kept_on_things']:.0%} on things")
    command = f"python -m vlmcompress.eval.ground {model} --task {task} --keep {keep} --limit {limit} --out {out}"
    write_json(out, {"command": command, "questions": len(samples), "environment": environment(), "rows": found})


if __name__ == "__main__":
    typer.run(main)
