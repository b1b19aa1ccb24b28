# SPDX-License-Identifier: Apache-2.0
"""The recipe of tiny-llava, from nothing to a model folder, in three stages with the Hugging Face Trainer.

1. tower: the CLIP tower on captions (`tower.py`);
2. language: projector and Llama from scratch on the frozen tower, easy scenes first, at a constant rate;
3. last: the same with fewer questions per image and a falling rate; with ``unfreeze`` the tower learns too, beside its
   own losses.

Stages 2 and 3 hold easy-VQA's training split besides scenes.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from .data import IGNORED, CaptionCollator, CaptionDataset, EasyVQA, JointCollator, QuestionCollator, QuestionDataset
from .processor import build_processor
from .runs import Measure, plot, settings, train
from .scenes import SceneConfig
from .tower import FEATURE_LAYER, TowerConfig, TowerWithHeads, measure_tower

TOWER_SHARE = 0.5  # weight of the tower's own losses in stage 3
TOWER_SCENES = SceneConfig(digit_share=0.9, label_share=0.9)
VALIDATION_SEED = 77_000_000  # training scenes use the run's seed plus the stage, the test set its own (testset.py)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome, besides the machine."""

    seed: int = 0
    tower_scenes: SceneConfig = TOWER_SCENES
    scenes: SceneConfig = field(default_factory=SceneConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    hidden_size: int = 160
    layers: int = 5
    heads: int = 4
    questions: int = 16
    last_questions: int = 10  # stage 3: more images for the same time
    tower_steps: int = 1065
    tower_batch: int = 64
    language_steps: int = 800
    easy_steps: int = 400
    last_steps: int = 1544
    unfreeze: bool = False  # whether the tower learns in stage 3
    batch: int = 16
    easy_vqa_share: float = 0.2
    tower_rate: float = 1.5e-3
    language_rate: float = 1e-3
    last_rate: float = 8e-4
    validation_images: int = 250
    measure_every: int = 250
    save_every: int = 200
    threads: int | None = field(default=None, compare=False)

    @property
    def image_tokens(self) -> int:
        return self.tower.grid**2


def llava_config(recipe: Recipe, tokenizer, vision: CLIPVisionConfig) -> LlavaConfig:
    """A small LLaVA-1.5 configuration. Weights are drawn with σ 0.08: the usual 0.02 is too small at this width."""
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=recipe.hidden_size, intermediate_size=round(2.7 * recipe.hidden_size),
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=2048, initializer_range=0.08, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default", image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=recipe.image_tokens,
    )  # fmt: skip


def train_tower(recipe: Recipe, folder: Path, processor, resume: bool) -> TowerWithHeads:
    """Stage 1. Returns the tower, whose weights are stored as ``tower.pt``."""
    torch.manual_seed(recipe.seed)
    model = TowerWithHeads(recipe.tower, processor.tokenizer)
    done = folder / "tower.pt"
    if resume and done.exists():
        model.load_state_dict(torch.load(done, weights_only=True))
        return model
    patch, collator = recipe.tower.patch_size, CaptionCollator(processor.tokenizer)
    length = recipe.tower_steps * recipe.tower_batch
    dataset = CaptionDataset(recipe.seed + 1, length, recipe.tower_scenes, patch)
    validation = CaptionDataset(VALIDATION_SEED, 256, recipe.tower_scenes, patch)
    measure = Measure(lambda m: measure_tower(m, validation, collator), recipe.measure_every)
    args = settings(
        folder, recipe.tower_steps, recipe.tower_batch, recipe.tower_rate, recipe.seed,
        save_steps=recipe.save_every, label_names=[],
    )  # fmt: skip
    train(model, args, dataset, collator, measure, resume)
    torch.save(model.state_dict(), done)
    return model


def build_llava(recipe: Recipe, processor, tower: TowerWithHeads) -> LlavaForConditionalGeneration:
    """The model before stage 2: the trained tower, everything else fresh."""
    torch.manual_seed(recipe.seed)
    vision = tower.clip.vision_model
    model = LlavaForConditionalGeneration(llava_config(recipe, processor.tokenizer, vision.config))
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.generation_config.update(max_new_tokens=4, do_sample=False)
    return model


class AnswerModel(nn.Module):
    """LLaVA as the Trainer sees it, in stage 3 optionally with the heads of stage 1 on the same tower.

    A plain module on purpose: a LLaVA checkpoint is saved under other names than those of its modules, and the Trainer's
    resume would pass over all of them without a word. With ``tower`` the tower learns too; without the tower's own
    losses the CLS token in the last layer would lose touch with the layers below it, which LLaVA reads.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, tower: TowerWithHeads | None = None):
        super().__init__()
        self.llava, self.tower = llava, tower
        if tower is not None:
            tower.clip.vision_model = None  # the tower lives in LLaVA

    def forward(self, pixel_values, input_ids, attention_mask, position_ids, labels, **tower_labels):
        """What the collators make → loss."""
        tower_labels.pop("num_items_in_batch", None)  # the Trainer adds it for losses that are sums
        core = self.llava.model
        seen = core.vision_tower(pixel_values, output_hidden_states=True)
        image = core.multi_modal_projector(seen.hidden_states[FEATURE_LAYER][:, 1:])
        embeds = core.get_input_embeddings()(input_ids)
        here = (input_ids == self.llava.config.image_token_id)[..., None]
        answer = self.llava(
            inputs_embeds=embeds.masked_scatter(here, image.to(embeds.dtype)), attention_mask=attention_mask,
            position_ids=position_ids, labels=labels, use_cache=False,
        )  # fmt: skip
        kept = 0.0 if self.tower is None else TOWER_SHARE * self.tower.losses(seen, **tower_labels)["loss"]
        return {"loss": answer.loss + kept}


def train_answers(
    recipe: Recipe, folder: Path, processor, model, tower: TowerWithHeads | None, last: bool, resume: bool
):
    """Stage 2, or stage 3 with ``last``; the tower is frozen unless its heads are given in ``tower``."""
    done = folder / "model"
    if resume and done.exists():
        return LlavaForConditionalGeneration.from_pretrained(done)
    model.model.vision_tower.requires_grad_(tower is not None)
    steps, rate = (recipe.last_steps, recipe.last_rate) if last else (recipe.language_steps, recipe.language_rate)
    seed, length = recipe.seed + (3 if last else 2), steps * recipe.batch
    dataset = QuestionDataset(
        seed, length, recipe.scenes, recipe.last_questions if last else recipe.questions,
        easy_until=0 if last else recipe.easy_steps * recipe.batch,
        easy_vqa=EasyVQA("train", processor.image_processor), easy_vqa_share=recipe.easy_vqa_share,
        patch=0 if tower is None else recipe.tower.patch_size,
    )  # fmt: skip
    collator = QuestionCollator(processor.tokenizer, recipe.image_tokens, seed)
    args = settings(
        folder, steps, recipe.batch, rate, seed, save_steps=recipe.save_every, label_names=["labels"],
        lr_scheduler_type="cosine" if last else "constant_with_warmup", warmup_steps=min(30 if last else 100, steps // 5),
    )  # fmt: skip
    measure = Measure(lambda m: measure_validation(m.llava, recipe, processor), recipe.measure_every)
    trained = AnswerModel(model, tower)
    train(trained, args, dataset, collator if tower is None else JointCollator(collator), measure, resume)
    model.requires_grad_(True).save_pretrained(done)
    return model


def measure_validation(model, recipe: Recipe, processor) -> dict[str, float]:
    """Accuracy per kind on validation scenes."""
    plain = QuestionCollator(processor.tokenizer, recipe.image_tokens, augment=0.0)
    scenes = QuestionDataset(VALIDATION_SEED, recipe.validation_images, recipe.scenes, recipe.questions)
    return measure_answers(model, scenes, plain)


@torch.no_grad()
def measure_answers(model, dataset, collator, batch_size: int = 32) -> dict[str, float]:
    """Share of right answers per kind; the mask of the collator makes each pair the only one its image has."""
    training = model.training
    model.eval()
    right, total = defaultdict(int), defaultdict(int)
    for start in range(0, len(dataset), batch_size):
        items = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = {k: v.to(model.device) for k, v in collator(items).items()}
        labels = batch.pop("labels")
        guesses = model(**batch, use_cache=False).logits.argmax(-1)[:, :-1]
        for row, item in enumerate(items):
            asked = (labels[row] != IGNORED) & (labels[row] != collator.end_id)
            for place, qa in zip(asked.nonzero().flatten().tolist(), item["qas"], strict=True):
                right[qa.kind] += int(guesses[row, place - 1] == labels[row, place])
                total[qa.kind] += 1
    model.train(training)
    found = {kind: right[kind] / total[kind] for kind in sorted(total)}
    return {"all": sum(right.values()) / sum(total.values()), **found}


def train_tiny_llava(recipe: Recipe, output: Path, work: Path, resume: bool = True) -> Path:
    """Run the three stages and save model, processor and loss plot under ``output``.

    ``work`` holds checkpoints; with ``resume`` a run that was cut off goes on from the last one.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    processor = build_processor(recipe.tower.image_size, recipe.tower.patch_size)
    tower = train_tower(recipe, work / "tower", processor, resume)
    model = build_llava(recipe, processor, tower)
    model = train_answers(recipe, work / "language", processor, model, None, False, resume)
    model = train_answers(recipe, work / "last", processor, model, tower if recipe.unfreeze else None, True, resume)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    plot([work / stage for stage in ("tower", "language", "last")], output / "training.png")
    return output
