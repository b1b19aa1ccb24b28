# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX's claim on a small LLaVA: one flexible model against models of one count, each used at every count.

All arms start from one warm start, the base model with a fresh projector trained at counts drawn uniformly, so that none
has to learn from scratch to address image tokens whose relative position depends on the count. Then every arm trains for
equal steps on the same data in the same order; questions of a scene stand in random order.
The flexible arm runs twice, with the paper's shares of the counts and with even ones.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import flex
from ..eval.loading import answer, encode
from ..eval.stats import accuracy, mean_sd
from ..eval.tasks import Sample, load
from .runs import device_at_hand, readers
from .tokenflex import FlexRun, train_tokenflex


@dataclass(frozen=True)
class FlexStudy:
    """Everything that decides the outcome, besides the machine. ``limit`` None asks every question."""

    base: str
    counts: tuple[int, ...] = (9, 36, 144)
    probabilities: tuple[float, ...] = (0.2, 0.3, 0.5)
    untrained: tuple[int, ...] = (4, 16, 64)
    warm_steps: int = 1000
    steps: int = 500
    batch: int = 16
    warm_rate: float = 8e-4
    rate: float = 4e-4
    questions: int = 10
    easy_vqa: bool = True
    tasks: tuple[str, ...] = ("scenes", "easy-vqa")
    limit: int | None = 1200

    def arms(self) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
        """Counts and probabilities of every arm."""
        fixed = {f"fixed-{n}": ((n,), (1.0,)) for n in self.counts}
        flexible = {"flexible": (self.counts, self.probabilities), "flexible-even": (self.counts, self.even)}
        return flexible | fixed

    @property
    def even(self) -> tuple[float, ...]:
        """Every count as likely as the others."""
        return (1 / len(self.counts),) * len(self.counts)


def run_study(study: FlexStudy, seeds: list[int], folder: Path) -> dict[str, Any]:
    """Warm start, then every arm at every seed; what ``folder`` holds is not done again. Writes the report."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "arms.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    common = FlexRun(
        study.base, folder / "warm", batch=study.batch, questions=study.questions, easy_vqa=study.easy_vqa, workers=readers()
    )  # fmt: skip
    warm = replace(
        common, counts=study.counts, probabilities=study.even, steps=study.warm_steps, rate=study.warm_rate,
        tower_rate=study.warm_rate / 10,
    )  # fmt: skip
    if not (warm.output / "log.json").exists():
        train_tokenflex(warm)
    samples = {task: load(task, limit=study.limit) for task in study.tasks}
    for seed in seeds:
        for arm, (counts, probabilities) in study.arms().items():
            if any((row["arm"], row["seed"]) == (arm, seed) for row in rows):
                continue
            run = replace(
                common, base=str(warm.output), output=folder / f"{arm}-{seed}", counts=counts, probabilities=probabilities,
                steps=study.steps, rate=study.rate, tower_rate=study.rate / 10, seed=1000 + seed,
            )  # fmt: skip
            start = time.perf_counter()
            train_tokenflex(run)
            seconds = time.perf_counter() - start
            log = [row for row in json.loads((run.output / "log.json").read_text()) if "visual_tokens" in row]
            trained = flex.from_pretrained(str(run.output)).to(device_at_hand()).eval()
            found = measure(trained, run.output, study, samples)
            rows.append({"arm": arm, "seed": seed, "seconds": round(seconds, 1),
                         "tokens_seen": log[-1]["visual_tokens"], "correct": found})  # fmt: skip
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    report = {
        "study": asdict(study),
        "seeds": seeds,
        "torch": torch.__version__,
        **summarize(study, rows, seeds, samples),
    }
    (folder / "study.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(study, report))
    plot(study, report, folder / "counts.png")
    return report


def measure(
    model: Any, folder: Path, study: FlexStudy, samples: dict[str, list[Sample]], batch: int = 256
) -> dict[str, dict[str, list[float]]]:
    """Per task and count: what every answer earns, in the order of the samples."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    found: dict[str, dict[str, list[float]]] = {}
    for task, asked in samples.items():
        found[task] = {}
        for tokens in sorted((*study.counts, *study.untrained)):
            marks: list[float] = []
            with flex.use(model, tokens):
                for start in range(0, len(asked), batch):
                    part = asked[start : start + batch]
                    inputs = encode(model, processor, [s.image for s in part], [s.question for s in part])
                    said = answer(model, processor, inputs, 3)
                    marks += [s.mark(text)["correct"] for s, text in zip(part, said, strict=True)]
            found[task][str(tokens)] = marks
    return found


def summarize(study: FlexStudy, rows: list[dict], seeds: list[int], samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """Accuracy with intervals (images resampled, seeds averaged per answer), tokens, seconds, and the two targets."""
    every = sorted((*study.counts, *study.untrained))
    table: dict[str, Any] = {}
    for task, asked in samples.items():
        pictures, table[task] = [s.picture for s in asked], {}
        for arm in study.arms():
            mine = [row["correct"][task] for row in rows if row["arm"] == arm and row["seed"] in seeds]
            table[task][arm] = {}
            for n in every:
                answers = torch.tensor([row[str(n)] for row in mine])
                interval = accuracy(answers.mean(0).tolist(), pictures)
                _, spread = mean_sd(answers.mean(1).tolist())
                table[task][arm][n] = {"mean": interval.value, "low": interval.low, "high": interval.high, "sd": spread}
    targets = {
        task: {arm: _targets(study, arms, arm) for arm in arms if arm.startswith("flexible")}
        for task, arms in table.items()
    }
    seen = {
        arm: mean_sd([row["tokens_seen"] for row in rows if row["arm"] == arm and row["seed"] in seeds])[0]
        for arm in study.arms()
    }
    return {"accuracy": table, "targets": targets, "tokens_seen": seen}


def _targets(study: FlexStudy, arms: dict[str, Any], flexible: str) -> dict[str, Any]:
    own = {n: arms[flexible][n]["mean"] - arms[f"fixed-{n}"][n]["mean"] for n in study.counts}
    away = {f"fixed-{a} at {b}": arms[flexible][b]["mean"] - arms[f"fixed-{a}"][b]["mean"]
            for a in study.counts for b in study.counts if a != b}  # fmt: skip
    return {
        "flexible − fixed at its own count": own,
        "holds ≥ −0.01": min(own.values()) >= -0.01,
        "flexible − fixed away from its count": away,
        "holds ≥ 0.03": min(away.values()) >= 0.03,
    }


def markdown(study: FlexStudy, report: dict[str, Any]) -> str:
    """The report as a page: a table for each task, targets, cost."""
    every = sorted((*study.counts, *study.untrained))
    seeds = ", ".join(map(str, report["seeds"]))
    lines = ["# One flexible model against models of one count", "",
             f"`vlmcompress train tokenflex-study --base {Path(study.base).name}`, seeds {seeds}; % right, intervals resample "
             "images."]  # fmt: skip
    for task, arms in report["accuracy"].items():
        head = [str(n) if n in study.counts else f"{n} (untrained)" for n in every]
        lines += ["", f"## {task}", "", f"| trained at | {' | '.join(head)} |", "|---|" + "---:|" * len(every)]
        for arm, cells in arms.items():
            texts = [
                f"{100 * c['mean']:.1f} [{100 * c['low']:.1f}, {100 * c['high']:.1f}]"
                for c in (cells[n] for n in every)
            ]
            lines.append(f"| {arm} | {' | '.join(texts)} |")
        lines += [
            "",
            "| points above the fixed arm | at its own count | where it is used at another |",
            "|---|---|---|",
        ]
        for arm, found in report["targets"][task].items():
            own, away = (found[f"flexible − fixed {where}"] for where in ("at its own count", "away from its count"))
            cells = [", ".join(f"{100 * d:+.1f} ({n})" for n, d in row.items()) for row in (own, away)]
            held = ["holds" if found[name] else "does not hold" for name in ("holds ≥ −0.01", "holds ≥ 0.03")]
            lines.append(f"| {arm} | {cells[0]}; ≥ −1: {held[0]} | {cells[1]}; ≥ +3: {held[1]} |")
    lines += ["", "| trained at | visual tokens seen |", "|---|---:|"]
    lines += [f"| {arm} | {seen:,.0f} |" for arm, seen in report["tokens_seen"].items()]
    return "\n".join([*lines, "", "![accuracy over tokens](counts.png)", ""])


def plot(study: FlexStudy, report: dict[str, Any], target: Path) -> None:
    """Accuracy over tokens per task; dashed lines mark the trained counts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, every = report["accuracy"], sorted((*study.counts, *study.untrained))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4), squeeze=False, layout="constrained")
    for axis, (task, arms) in zip(axes[0], tasks.items(), strict=True):
        for arm, cells in arms.items():
            style = {"marker": "o", "linewidth": 2.2 if arm.startswith("flexible") else 1}
            axis.plot(every, [100 * cells[n]["mean"] for n in every], label=arm, **style)
        for n in study.counts:
            axis.axvline(n, color="0.8", linestyle="--", zorder=0)
        axis.set(title=task, xlabel="visual tokens", ylabel="% right", xscale="log")
        axis.legend()
    figure.savefig(target, dpi=90)
    plt.close(figure)
