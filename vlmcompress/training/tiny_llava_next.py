# SPDX-License-Identifier: Apache-2.0
"""The recipe of tiny-llava-next: tower, projector and Llama of tiny-llava, taught to read tiles in one stage.

The tower is frozen: tiles show things at the size it knows. New is the newline embedding alone; what has to be learnt is
a prompt five times as long that shows everything twice. The loss is the stock model's own, through its own packing.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from .hires import HIRES_WEIGHTS, PINPOINTS, TiledCollator, TiledDataset, easy_vqa_pairs
from .processor import tiled_processor
from .runs import Measure, plot, settings, train
from .tiny_llava import VALIDATION_SEED, measure_answers

TRAINING_SEED = 31_000_000  # apart from tiny-llava's stages, from validation and from the test sets


@dataclass(frozen=True)
class NextRecipe:
    """Everything that decides the outcome, besides the base model and the machine."""

    seed: int = 0
    steps: int = 850
    small_steps: int = 150
    batch: int = 8
    questions: int = 16
    rate: float = 6e-4
    validation_images: int = 96
    measure_every: int = 100
    save_every: int = 50
    easy_vqa: bool = True
    threads: int | None = field(default=None, compare=False)


def build_llava_next(base: LlavaForConditionalGeneration, seed: int = 0) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT with the weights of ``base`` and a new ``image_newline``."""
    torch.manual_seed(seed)
    old = base.config
    config = LlavaNextConfig(
        vision_config=old.vision_config.to_dict(), text_config=old.text_config.to_dict(),
        image_grid_pinpoints=PINPOINTS, image_seq_length=old.image_seq_length, image_token_index=old.image_token_index,
        vision_feature_layer=old.vision_feature_layer, projector_hidden_act=old.projector_hidden_act,
        vision_feature_select_strategy=old.vision_feature_select_strategy,
        multimodal_projector_bias=old.multimodal_projector_bias, tie_word_embeddings=old.tie_word_embeddings,
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
    if missing != ["model.image_newline"] or unexpected:
        raise ValueError(f"The base model is no LLaVA-1.5 that fits: missing {missing}, unexpected {unexpected}")
    model.generation_config.update(max_new_tokens=4, do_sample=False)
    return model


class TiledAnswerModel(nn.Module):
    """The stock model as the Trainer sees it: a plain module, for the reason that `tiny_llava.AnswerModel` gives."""

    def __init__(self, llava: LlavaNextForConditionalGeneration):
        super().__init__()
        self.llava = llava

    def forward(self, labels, num_items_in_batch=None, **inputs):
        """What `TiledCollator` makes → loss."""
        return {"loss": self.llava(**inputs, labels=labels, use_cache=False).loss}


def train_tiny_llava_next(recipe: NextRecipe, base: Path, output: Path, work: Path, resume: bool = True) -> Path:
    """Train on the model folder ``base`` and save model, processor and plot under ``output``.

    ``work`` holds checkpoints; with ``resume`` a run that was cut off goes on from the last one.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    processor = tiled_processor(AutoProcessor.from_pretrained(base), PINPOINTS)
    model = build_llava_next(LlavaForConditionalGeneration.from_pretrained(base), recipe.seed)
    model.model.vision_tower.requires_grad_(False)
    seed, folder = TRAINING_SEED + recipe.seed, work / "answers"
    dataset = TiledDataset(
        seed, recipe.steps * recipe.batch, processor, recipe.questions, recipe.batch,
        recipe.small_steps * recipe.batch, easy_vqa_pairs() if recipe.easy_vqa else None,
    )  # fmt: skip
    args = settings(
        folder, recipe.steps, recipe.batch, recipe.rate, seed, save_steps=recipe.save_every, label_names=["labels"],
        warmup_steps=min(50, recipe.steps // 5),
    )  # fmt: skip
    measure = Measure(lambda m: measure_tiles(m.llava, recipe, processor), recipe.measure_every)
    train(TiledAnswerModel(model), args, dataset, TiledCollator(processor.tokenizer, seed), measure, resume)
    model.requires_grad_(True).save_pretrained(output)
    processor.save_pretrained(output)
    plot([folder], output / "training.png")
    return output


def measure_tiles(model, recipe: NextRecipe, processor) -> dict[str, float]:
    """Accuracy per kind on hires scenes for validation, asked as the test set asks."""
    scenes = TiledDataset(
        VALIDATION_SEED, recipe.validation_images, processor, recipe.questions, plain=False, weights=HIRES_WEIGHTS
    )
    return measure_answers(model, scenes, TiledCollator(processor.tokenizer, augment=0.0), batch_size=8)
