# SPDX-License-Identifier: Apache-2.0
"""What the stages share: Trainer settings, a periodic measurement, and the plot of a run."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments


def device_at_hand() -> torch.device:
    """Where training runs: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def readers() -> int:
    """Processes that make data ahead of the steps: a GPU waits for one alone. The data do not depend on their number."""
    return min(6, os.cpu_count() or 1) if torch.cuda.is_available() else 1


def fast_bf16() -> bool:
    """Whether this machine multiplies in bfloat16 natively (training then takes two thirds of the time)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu.get_capabilities().get("avx512_bf16", False)


def settings(folder: Path, steps: int, batch_size: int, learning_rate: float, seed: int, **more) -> TrainingArguments:
    """Training arguments of one stage; ``more`` overrides any of them."""
    chosen = dict(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=learning_rate,
        seed=seed, data_seed=seed, bf16=fast_bf16(), warmup_steps=min(100, steps // 5), lr_scheduler_type="cosine",
        adam_beta2=0.95, weight_decay=0.01, max_grad_norm=1.0, logging_steps=20, save_steps=200, save_total_limit=2,
        dataloader_num_workers=readers(), dataloader_persistent_workers=True, remove_unused_columns=False, report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return TrainingArguments(**{**chosen, **more})


class OrderedTrainer(Trainer):
    """A Trainer that reads the items in order: the data sets are already random, and a curriculum needs their order."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


class Measure(TrainerCallback):
    """Every ``every`` steps, and at the end, measure the model and append the numbers to ``measures.jsonl``."""

    def __init__(self, measure: Callable[[torch.nn.Module], dict[str, float]], every: int):
        self.measure, self.every = measure, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            numbers = {name: round(value, 4) for name, value in self.measure(model).items()}
            with open(Path(args.output_dir) / "measures.jsonl", "a") as file:
                file.write(json.dumps({"step": state.global_step, **numbers}) + "\n")


def train(
    model, args: TrainingArguments, dataset, collator, measure: Measure | None = None, resume: bool = False
) -> None:
    """Run one stage, with ``resume`` from its last checkpoint where there is one. Leaves ``log.json`` in its folder."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = OrderedTrainer(
        model=model, args=args, train_dataset=dataset, data_collator=collator, callbacks=[measure] if measure else None
    )
    has_checkpoint = any(folder.glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if resume and has_checkpoint else None)
    (folder / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


def plot(folders: list[Path], target: Path) -> None:
    """Draw loss and measurements of the stages, one row each, from the files they left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(folders), 2, figsize=(11, 3 * len(folders)), squeeze=False, layout="constrained")
    for (left, right), folder in zip(axes, folders, strict=True):
        log = [row for row in json.loads((folder / "log.json").read_text()) if "loss" in row]
        left.plot([row["step"] for row in log], [row["loss"] for row in log], linewidth=0.9)
        left.set(title=f"{folder.name}: loss", xlabel="step")
        path = folder / "measures.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for name in [k for k in (rows[0] if rows else {}) if k != "step"]:
            right.plot([row["step"] for row in rows], [row[name] for row in rows], ".-", label=name, linewidth=0.9)
        right.set(title=f"{folder.name}: validation accuracy", xlabel="step", ylim=(0, 1.02))
        right.legend(fontsize=7, ncols=2)
    figure.savefig(target, dpi=80)
    plt.close(figure)
