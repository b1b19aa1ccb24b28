# SPDX-License-Identifier: Apache-2.0
"""Training a predictor of visual relevance for one model (arXiv 2506.01097): labels from the model's own answers, then a net.

1. Labels: the model answers questions; where it is right, the gradient-weighted roll-out of its answer tells how much each
   visual token mattered, and the first layer's attention is noted. Written in numbered files, so that a run goes on.
2. The net learns to tell the labels from that attention, with the Trainer and its checkpoints.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..adapters.base import adapter_for
from ..attach import compress
from ..eval.loading import encode_chats, load, prompt_of
from ..eval.tasks import Sample
from ..eval.tasks import load as load_task
from ..methods.explainability import Explainability
from ..ops.relevance import kept_tokens, relevance_labels, relevance_loss
from ..relevance import RelevancePredictor, answer_relevance
from .data import KIND_WEIGHTS
from .questions import ask
from .runs import Measure, device_at_hand, plot, settings, train
from .scenes import SceneConfig, make_scene

TRAINING_SEED = 64_000_000  # apart from the models' own training, from validation and from the test sets
SHARES = (0.25, 0.5)  # budgets at which the net is measured


@dataclass(frozen=True)
class RelevanceRecipe:
    """Everything that decides the outcome, besides the model and the machine.

    ``tasks``: "scenes" draws new ones, other names are read as the training split of a task; they take turns by chunks.
    ``samples``: questions answered right, in chunks of ``chunk`` asked ones. ``answer_tokens``: of longer answers so many
    are explained, evenly spaced.
    """

    base: str
    tasks: tuple[str, ...] = ("scenes",)
    samples: int = 10_240
    chunk: int = 256
    per_image: int = 4
    label_batch: int = 32
    max_new_tokens: int = 64
    answer_tokens: int = 16
    drop: float = 0.5
    scale_by_length: bool = True
    epochs: int = 25
    batch: int = 128
    rate: float = 1e-3
    validation: int = 1024
    seed: int = 0
    threads: int | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Watch(Explainability):
    """Keeps everything and notes the prompt's embeddings, positions and first-layer maps of every prefill."""

    predictor: str | None = "identity"
    seen: list[Any] = field(default_factory=list)

    def arrival(self, layer, state, equipment) -> None:
        self.seen.append((layer.hidden, layer.frame.positions, layer.layout, self.map(layer)))

    def options(self) -> dict[str, Any]:
        return {}


@dataclass
class Explained:
    """One question: what the model said, and per visual token the first-layer ``map`` and the ``relevance``, [N] each."""

    sample: Sample
    prediction: str
    map: Tensor
    relevance: Tensor

    @property
    def right(self) -> bool:
        return bool(self.sample.mark(self.prediction)["correct"])


def explain(model: Any, processor: Any, samples: Sequence[Sample], recipe: RelevanceRecipe) -> Iterator[Explained]:
    """Answer ``samples``, each with one image, and explain the answers; the order is by length of prompts.

    ``model`` runs eager attention. Prompts and answers of one length share a batch: there is no padding.
    """
    lengths: dict[Any, list[Sample]] = defaultdict(list)
    for sample in samples:
        ids = processor.tokenizer(prompt_of(processor, sample.chat()))["input_ids"]
        lengths[len(ids), getattr(sample.image, "size", None)].append(sample)
    for alike in lengths.values():
        for start in range(0, len(alike), recipe.label_batch):
            yield from _explain(model, processor, alike[start : start + recipe.label_batch], recipe)


def _explain(model: Any, processor: Any, samples: list[Sample], recipe: RelevanceRecipe) -> Iterator[Explained]:
    inputs = encode_chats(model, processor, [sample.chat() for sample in samples])
    watch = Watch()
    with compress(model, watch), torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=recipe.max_new_tokens)
    embeds, positions, layout, maps = watch.seen[0]
    answers = out[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    special = torch.tensor(processor.tokenizer.all_special_ids, device=answers.device)
    steps = (~torch.isin(answers, special)).cumprod(1).sum(1).tolist()
    for number in sorted(set(steps) - {0}):
        rows = [i for i, n in enumerate(steps) if n == number]
        relevance = _relevance(model, embeds[rows], positions[..., rows, :], answers[rows, :number], recipe)
        for row, found in zip(rows, relevance, strict=True):
            n = layout.n[row]
            columns = layout.column[row, :n]
            yield Explained(samples[row], texts[row].strip(), maps[row, :n], found[columns])


def _relevance(model: Any, embeds: Tensor, positions: Tensor, answer: Tensor, recipe: RelevanceRecipe) -> Tensor:
    """[B, n] relevance of every position of the prompts to their answers, mean over the explained tokens."""
    adapter, prompt = adapter_for(model), embeds.shape[1]
    more = model.get_input_embeddings()(answer[:, :-1]).detach()
    behind = positions.amax(-1, keepdim=True)
    if positions.ndim == 3:  # text goes on behind the largest of the axes
        behind = behind.amax(0, keepdim=True).expand(len(positions), -1, -1)
    further = behind + torch.arange(1, more.shape[1] + 1, device=positions.device)
    where = torch.cat([positions, further], -1)

    def logits_of(x: Tensor) -> Tensor:
        found = adapter.language_model(inputs_embeds=x, position_ids=where, use_cache=False)
        return model.lm_head(found.last_hidden_state)

    modules = [layer.self_attn for layer in adapter.decoder_layers]
    steps = answer.shape[1]
    wanted = torch.linspace(0, steps - 1, min(steps, recipe.answer_tokens)).round().long().unique().tolist()
    found = answer_relevance(modules, logits_of, torch.cat([embeds, more], 1), prompt, answer, steps=wanted)
    return found[..., :prompt].mean(1)


# labels ---------------------------------------------------------------------------------------------------------
def asked(recipe: RelevanceRecipe, number: int) -> list[Sample]:
    """The questions of chunk ``number``; a function of the recipe and the number alone."""
    task = recipe.tasks[number % len(recipe.tasks)]
    rng = np.random.default_rng((TRAINING_SEED + recipe.seed, number))
    if task != "scenes":
        pool = load_task(task, split="train")
        return [pool[i] for i in rng.choice(len(pool), min(recipe.chunk, len(pool)), replace=False)]
    samples: list[Sample] = []
    for i in range(recipe.chunk // recipe.per_image):
        scene = make_scene(TRAINING_SEED + recipe.seed, number * recipe.chunk + i, SceneConfig())
        samples += [
            Sample(f"{number}-{i}-{n}", scene.image, qa.question, qa.answer, qa.kind)
            for n, qa in enumerate(ask(scene, rng, recipe.per_image, KIND_WEIGHTS))
        ]
    return samples


def write_labels(recipe: RelevanceRecipe, folder: Path) -> list[Path]:
    """Numbered files of maps and relevance, padded, with the number of tokens of each; those that exist stay.

    Raises ``ValueError`` when the model answers next to nothing right, so that no net could learn from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = processor = None
    files, found, number = [], 0, 0
    while found < recipe.samples:
        path = folder / f"{number:04d}.safetensors"
        if not path.is_file():
            if model is None:
                model, processor = load(recipe.base, device=device_at_hand(), attn_implementation="eager")
                model.requires_grad_(False)
            good = [e for e in explain(model, processor, asked(recipe, number), recipe) if e.right]
            if len(good) * 20 < recipe.chunk:
                raise ValueError(
                    f"The model answers {len(good)} of {recipe.chunk} questions right; nothing to learn from."
                )
            _write(good, path)
        files.append(path)
        found += len(load_file(path)["n"])
        number += 1
    return files


def _write(explained: list[Explained], path: Path) -> None:
    maps, relevance = ([getattr(e, name).float().cpu() for e in explained] for name in ("map", "relevance"))
    tensors = {
        "map": pad_sequence(maps, batch_first=True),
        "relevance": pad_sequence(relevance, batch_first=True),
        "n": torch.tensor([len(line) for line in maps]),
    }
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)  # a run that is cut off leaves no half file


class RelevanceData(Dataset):
    """Labelled maps in random order, anew in every epoch; item ``i`` is a function of the seed and of ``i``.

    Samples whose relevance is zero throughout are left out.
    """

    def __init__(self, files: Sequence[Path], recipe: RelevanceRecipe, length: int | None = None):
        rows = []
        for path in files:
            stored = load_file(path)
            rows += [
                (stored["map"][i, :n], stored["relevance"][i, :n]) for i, n in enumerate(stored["n"].tolist())
            ]  # fmt: skip
        self.rows = [row for row in rows if bool((row[1] > 0).any())]
        self.recipe, self.length = recipe, len(self.rows) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        epoch, place = divmod(i, len(self.rows))
        order = np.random.default_rng((self.recipe.seed, epoch)).permutation(len(self.rows))
        maps, relevance = self.rows[order[place]]
        return {"map": maps, "relevance": relevance}


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """``map``, ``relevance`` and ``valid``, [B, N] each."""
    full = {name: pad_sequence([item[name] for item in items], batch_first=True) for name in ("map", "relevance")}
    length = torch.tensor([len(item["map"]) for item in items])
    return {**full, "valid": torch.arange(full["map"].shape[1]) < length[:, None]}


# the net --------------------------------------------------------------------------------------------------------
class Learner(nn.Module):
    """The predictor as the Trainer sees it."""

    def __init__(self, predictor: RelevancePredictor, drop: float):
        super().__init__()
        self.predictor, self.drop = predictor, drop

    def forward(self, map: Tensor, relevance: Tensor, valid: Tensor, num_items_in_batch: Any = None):
        """What `collate` makes → loss: KL to the labels, mean over the batch."""
        label = relevance_labels(relevance, valid, self.drop)
        return {"loss": relevance_loss(label, self.predictor(map, valid)).mean()}


@torch.no_grad()
def measure_predictor(learner: Learner, data: RelevanceData) -> dict[str, float]:
    """Loss, and the share of all relevance that lies on the tokens kept at `SHARES`: by the net, by the map, at best."""
    learner.eval()
    batch = {
        k: v.to(next(learner.parameters()).device) for k, v in collate([data[i] for i in range(len(data))]).items()
    }
    relevance, valid = batch["relevance"], batch["valid"]
    found = {"loss": float(learner(**batch)["loss"])}
    ranks = {"net": learner.predictor(batch["map"], valid), "map": batch["map"], "best": relevance}
    whole = relevance.sum(1)
    for share in SHARES:
        for name, scores in ranks.items():
            kept = kept_tokens(scores, share, valid)
            held = torch.stack([row[index].sum() for row, index in zip(relevance, kept, strict=True)])
            found[f"{name} {share:g}"] = float((held / whole).mean())
    learner.train()
    return found


def train_explainability(recipe: RelevanceRecipe, output: Path, work: Path, resume: bool = True) -> Path:
    """Write the predictor of the model ``recipe.base`` to the file ``output``; ``work`` holds labels and checkpoints.

    With ``resume`` a run that was cut off goes on with the labels and the last checkpoint that are there.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    files = write_labels(recipe, work / "labels")
    held_out = max(1, round(recipe.validation / recipe.chunk))
    if held_out >= len(files):
        raise ValueError(f"{recipe.validation} samples for validation leave none of {recipe.samples} to learn from.")
    # whole chunks, so that no image is on both sides
    data = RelevanceData(files[held_out:], recipe)
    steps = max(1, round(recipe.epochs * len(data) / recipe.batch))
    data.length = steps * recipe.batch
    validation = RelevanceData(files[:held_out], recipe)
    torch.manual_seed(recipe.seed)
    learner = Learner(RelevancePredictor(scale_by_length=recipe.scale_by_length), recipe.drop)
    args = settings(
        work / "net", steps, recipe.batch, recipe.rate, recipe.seed, bf16=False, weight_decay=0.0, adam_beta2=0.999,
        label_names=[], dataloader_num_workers=0, dataloader_persistent_workers=False,
    )  # fmt: skip
    measure = Measure(lambda m: measure_predictor(m, validation), max(1, steps // 12))
    train(learner, args, data, collate, measure, resume)
    output.parent.mkdir(parents=True, exist_ok=True)
    learner.predictor.cpu().save(output)
    plot([work / "net"], work / "training.png")
    return output
