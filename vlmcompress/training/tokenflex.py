# SPDX-License-Identifier: Apache-2.0
"""Training a model with a TokenFLEX projector: the stages, a Trainer, and the run behind ``vlmcompress train tokenflex``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Trainer, TrainingArguments

from .. import flex
from ..adapters.base import adapter_for
from ..checkpoints import loader_of
from .chats import ChatCollator, JsonChats, SceneChats
from .counts import IGNORED, CountSchedule, FlexCallback
from .hires import easy_vqa_pairs
from .prior import CachedWeights, PriorLoss, reference_weights
from .runs import fast_bf16

#: what learns in each stage: the projector alone, then everything (the paper names the stages, not what they freeze)
STAGES = {
    "align": ("projector",),
    "vision": ("projector", "tower", "language"),
    "instruct": ("projector", "tower", "language"),
}
#: learning rates of a LLaVA-size reproduction: of the stage, and of its tower
RATES = {"align": (1e-3, 1e-3), "vision": (2e-5, 2e-6), "instruct": (2e-5, 2e-6)}


def freeze(model: PreTrainedModel, stage: str) -> None:
    """Let only the parts of ``stage`` learn. Raises ``ValueError`` for an unknown stage."""
    if stage not in STAGES:
        raise ValueError(f"stage is one of {', '.join(STAGES)}, not {stage!r}.")
    model.requires_grad_(False)
    parts = {
        "projector": (model.model.multi_modal_projector,),
        "tower": (model.model.vision_tower,),
        "language": (model.model.language_model, model.lm_head),
    }
    for name in STAGES[stage]:
        for module in parts[name]:
            module.requires_grad_(True)
    # what lies behind the layer that is read never gets a gradient, which data-parallel training would wait for
    adapter = adapter_for(model)
    normed = model.config.tokenflex["apply_post_layernorm"]
    behind = list(adapter.tower_layers[adapter.feature_layer + 1 :])
    inside = getattr(adapter.tower, "vision_model", adapter.tower)
    behind += [] if normed else [m for m in (getattr(inside, "post_layernorm", None),) if m is not None]
    for module in behind:
        module.requires_grad_(False)


class FlexTrainer(Trainer):
    """The stock Trainer, with a rate of its own for the tower and a resume that finds every weight.

    A LLaVA checkpoint is stored under other names than those of its modules, and the stock resume passes over all of them
    without a word.
    """

    def __init__(self, *args: Any, tower_rate: float | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tower_rate = tower_rate

    def create_optimizer(self, model: nn.Module | None = None):
        if self.optimizer is None:
            base = self.model
            tower = {id(p) for p in base.model.vision_tower.parameters()}
            learning = [p for p in base.parameters() if p.requires_grad]
            rate = self.args.learning_rate
            groups = [
                {"params": [p for p in learning if id(p) not in tower], "lr": rate},
                {"params": [p for p in learning if id(p) in tower], "lr": self.tower_rate or rate},
            ]
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, base)
            weight_decay = self.args.weight_decay
            groups = [group | {"weight_decay": weight_decay} for group in groups if group["params"]]
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        saved = loader_of(model.config)(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())


class SqrtLoss:
    """The released weighting: every token of a sample counts 1 / √(answer tokens of the sample), normalised over ranks.

    Within one micro-batch; the micro-batches of a step are weighted by their tokens.
    """

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        target = nn.functional.pad(labels.to(logits.device), (0, 1), value=IGNORED)[:, 1:].contiguous()
        here = target != IGNORED
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(target)
        number = here.sum(1, keepdim=True).clamp_min(1)
        weights = here / number.sqrt()
        sums = torch.stack([here.sum().float(), weights.sum()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        items = here.sum() if num_items_in_batch is None else num_items_in_batch
        return (losses * weights).sum() * (sums[0] / sums[1].clamp_min(1e-12)) / items


@dataclass(frozen=True)
class FlexRun:
    """One stage of training. ``data`` None: scenes of ours, with ``easy_vqa`` every fourth from easy-VQA's training split.
    ``prior`` is the alpha of the PRIOR loss, 0 leaves it out.

    ``counts`` of one number with probability 1 is a fixed-count baseline: same data, same steps.
    """

    base: str
    output: Path
    stage: str = "instruct"
    data: Path | None = None
    images: Path | None = None
    counts: tuple[int, ...] = flex.COUNTS
    probabilities: tuple[float, ...] | None = None
    draw: str = "micro_batch"
    pooling: str = "adaptive"
    apply_post_layernorm: bool = False
    steps: int = 1000
    batch: int = 16
    accumulate: int = 1
    rate: float | None = None
    tower_rate: float | None = None
    questions: int = 8
    easy_vqa: bool = False
    prior: float = 0.0
    reference: str | None = None
    loss_weighting: str = "token"
    seed: int = 0
    gradient_checkpointing: bool = False
    workers: int = 1
    save_every: int = 200
    resume: bool = True

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage is one of {', '.join(STAGES)}, not {self.stage!r}.")
        if self.loss_weighting not in ("token", "sqrt"):
            raise ValueError(f"loss_weighting is token or sqrt, not {self.loss_weighting!r}.")
        if self.prior and self.loss_weighting == "sqrt":
            raise ValueError("The PRIOR loss has weights of its own; take it or loss_weighting='sqrt', not both.")
        if (self.data is None) != (self.images is None):
            raise ValueError("A data file comes with the folder of its images, and the other way round.")


def load_base(run: FlexRun) -> tuple[PreTrainedModel, Any]:
    """Model and processor of ``run.base``: one that has the projector already goes on with it, another gets a fresh one."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(run.base)
    processor = AutoProcessor.from_pretrained(run.base)
    if entry := getattr(config, "tokenflex", None):
        model = flex.from_pretrained(run.base, dtype=torch.float32)
        drawn = flex.FlexConfig(run.counts, run.probabilities)
        model.config.tokenflex = entry | {"counts": list(drawn.counts), "probabilities": list(drawn.probabilities)}
        return model, processor
    model = AutoModelForImageTextToText.from_pretrained(run.base, dtype=torch.float32)
    torch.manual_seed(run.seed)
    flex.install(
        model, run.counts, probabilities=run.probabilities, pooling=run.pooling,
        apply_post_layernorm=run.apply_post_layernorm,
    )  # fmt: skip
    return model, processor


def train_tokenflex(run: FlexRun, callbacks: Iterable[Any] = ()) -> Path:
    """Run one stage and save model, processor and log under ``run.output``. Goes on from the last checkpoint there."""
    model, processor = load_base(run)
    freeze(model, run.stage)
    settings = flex.FlexConfig(run.counts, run.probabilities)
    settings.fit(model.model.multi_modal_projector.grid)
    work = run.output.with_name(run.output.name + "-work")
    rate, tower_rate = RATES[run.stage]
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(work), max_steps=run.steps, per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate, learning_rate=run.rate or rate, lr_scheduler_type="cosine",
        warmup_steps=max(1, round(0.03 * run.steps)), weight_decay=0.0, max_grad_norm=1.0, seed=run.seed, data_seed=run.seed,
        bf16=fast_bf16(), gradient_checkpointing=run.gradient_checkpointing, remove_unused_columns=False, report_to=[],
        gradient_checkpointing_kwargs={"use_reentrant": False} if run.gradient_checkpointing else None,
        logging_steps=max(1, min(20, run.steps // 5)), save_steps=run.save_every, save_total_limit=2,
        label_names=["labels"], dataloader_num_workers=run.workers, dataloader_pin_memory=cuda, use_cpu=not cuda,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    if run.data is None:
        length = run.steps * run.batch * run.accumulate * arguments.world_size
        pairs = easy_vqa_pairs() if run.easy_vqa else None
        dataset: Any = SceneChats(run.seed + 1, length, questions=run.questions, pairs=pairs)
    else:
        assert run.images is not None
        dataset = JsonChats(run.data, run.images)
    weights = _weights(run, model, processor, dataset, work) if run.prior else None
    if run.prior or run.loss_weighting == "sqrt":
        model.loss_function = PriorLoss(run.prior) if run.prior else SqrtLoss()
    schedule = CountSchedule(settings.counts, settings.probabilities, run.seed, run.draw)
    trainer = FlexTrainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=ChatCollator(processor, weights=weights),
        callbacks=[FlexCallback(schedule), *callbacks], tower_rate=run.tower_rate or tower_rate,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=True if run.resume and any(work.glob("checkpoint-*")) else None)
    if trainer.is_world_process_zero():
        if run.prior:
            model.config.prior = {"alpha": run.prior, "reference": run.reference or "base"}
        model.requires_grad_(True).save_pretrained(run.output)
        processor.save_pretrained(run.output)
        (run.output / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))
    return run.output


def _weights(run: FlexRun, model: PreTrainedModel, processor: Any, dataset: Any, work: Path) -> CachedWeights:
    """Reference probabilities of the whole data set, from the file of an earlier run where there is one."""
    path = work / "reference.safetensors"
    if path.is_file():
        return CachedWeights.load(path)
    if run.reference is None:
        reference: Any = model  # itself without pixels, untuned: words of the template get high weights too
    else:
        from transformers import AutoModelForCausalLM

        reference = AutoModelForCausalLM.from_pretrained(run.reference)
        if reference.config.vocab_size != model.config.get_text_config().vocab_size:
            raise ValueError(
                f"'{run.reference}' has another vocabulary than '{run.base}'; a reference shares the tokenizer."
            )
    collator = ChatCollator(processor)
    cached = CachedWeights(_scored(reference.eval(), collator, dataset))
    work.mkdir(parents=True, exist_ok=True)
    cached.save(path)
    return cached


def _scored(reference: Any, collator: ChatCollator, dataset: Any, batch: int = 16) -> Iterable[Tensor]:
    for start in range(0, len(dataset), batch):
        rows = [collator.encode(dataset[i]["messages"]) for i in range(start, min(start + batch, len(dataset)))]
        ids = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        labels = nn.utils.rnn.pad_sequence([row[1] for row in rows], batch_first=True, padding_value=IGNORED)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row[0]) for row in rows], batch_first=True)
        found = reference_weights(reference, ids, labels, collator.processor.image_token_id, mask)
        yield from (line[: len(row[0])] for line, row in zip(found, rows, strict=True))
