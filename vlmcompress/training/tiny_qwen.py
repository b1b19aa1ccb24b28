# SPDX-License-Identifier: Apache-2.0
"""The recipe of tiny-qwen2.5-vl: the language model of tiny-llava behind a new tower, in two stages.

1. copy: tower and merger, of Qwen's kind and with four times the patches, learn to give for every cell of 8 × 8 pixels
   what tiny-llava's tower and projector give there, apart from where it is: a tower with rotary positions alone gives
   one feature for all cells of a plain picture;
2. answers: tower, merger and language model learn questions about pictures of many sizes and about clips, and places
   from M-RoPE.

tiny-llava's Llama is a Qwen2 without biases at its query, key and value projections, so its weights fit as they are.
Stock M-RoPE gives columns the slowest angles; at tiny-llava's base of 10,000 twelve columns would look like one.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from .data import normalize
from .hires import easy_vqa_pairs
from .runs import Measure, plot, settings, train
from .scenes import SceneConfig
from .tiny_llava import TOWER_SCENES, VALIDATION_SEED, measure_answers
from .tiny_qwen_data import (
    FRAMES,
    MERGE,
    PATCH,
    QwenCollator,
    QwenDataset,
    ViewDataset,
    collate_views,
    grid_of,
    qwen_processor,
    to_patches,
)

TRAINING_SEED = 47_000_000  # apart from the other models' stages, from validation and from the test sets
FRAMES_PER_SECOND = 24  # what the processor takes a clip without a clock for


@dataclass(frozen=True)
class QwenRecipe:
    """Everything that decides the outcome, besides the base model and the machine."""

    seed: int = 0
    width: int = 96
    layers: int = 4
    heads: int = 3
    full_attention: tuple[int, ...] = (1, 3)  # the other layers look around within windows
    window: int = 32
    rope_theta: float = 100.0
    copy_steps: int = 1500
    copy_batch: int = 16
    copy_rate: float = 1.5e-3
    answer_steps: int = 2600
    easy_steps: int = 500
    batch: int = 16
    questions: int = 10
    answer_rate: float = 7e-4
    validation_images: int = 96
    measure_every: int = 400
    save_every: int = 100
    easy_vqa: bool = True
    threads: int | None = field(default=None, compare=False)


def qwen_config(recipe: QwenRecipe, base, tokenizer) -> Qwen2_5_VLConfig:
    """A stock configuration around the text model of the LLaVA configuration ``base``."""
    old = base.text_config
    head = old.hidden_size // old.num_attention_heads
    time, row = max(1, head // 20), head // 5
    text = Qwen2_5_VLTextConfig(
        vocab_size=len(tokenizer), hidden_size=old.hidden_size, intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers, num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads, rms_norm_eps=old.rms_norm_eps, max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default", "rope_theta": recipe.rope_theta, "mrope_section": [time, row, head // 2 - time - row],
        },
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = Qwen2_5_VLVisionConfig(
        depth=recipe.layers, hidden_size=recipe.width, intermediate_size=2 * recipe.width, num_heads=recipe.heads,
        patch_size=PATCH, spatial_merge_size=MERGE, temporal_patch_size=FRAMES, window_size=recipe.window,
        fullatt_block_indexes=list(recipe.full_attention), out_hidden_size=old.hidden_size, initializer_range=0.08,
        tokens_per_second=FRAMES_PER_SECOND // FRAMES,
    )  # fmt: skip
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{text}|>")
        for name, text in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    return Qwen2_5_VLConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **ids,
    )  # fmt: skip


def build_qwen(
    recipe: QwenRecipe, base: LlavaForConditionalGeneration, tokenizer
) -> Qwen2_5_VLForConditionalGeneration:
    """The language model of ``base`` behind a fresh tower. Raises ``ValueError`` where its weights do not fit."""
    torch.manual_seed(recipe.seed)
    model = Qwen2_5_VLForConditionalGeneration(qwen_config(recipe, base.config, tokenizer))
    missing, unexpected = model.model.language_model.load_state_dict(
        base.model.language_model.state_dict(), strict=False
    )
    if unexpected or not all(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in missing):
        raise ValueError(f"The base model's language model does not fit: missing {missing}, unexpected {unexpected}")
    model.lm_head.load_state_dict(base.lm_head.state_dict())
    _start_local(model.model.visual)
    model.generation_config.update(max_new_tokens=4, do_sample=False)
    return model


@torch.no_grad()
def _start_local(visual) -> None:
    """Start the tower where patches look at their neighbours.

    A constant in the biases of queries and keys adds to each logit the sum of the cosines of RoPE's angles between the
    two patches, which is largest for near ones. From random weights a tower of this size finds that out slowly.
    """
    head = visual.config.hidden_size // visual.config.num_heads
    for n, block in enumerate(visual.blocks):
        bias = block.attn.qkv.bias.view(3, visual.config.num_heads, head).zero_()
        for h in range(visual.config.num_heads):  # some heads look nearer than others
            for axis in (0, head // 4):  # the three quickest angles of rows and of columns tell near patches apart
                bias[:2, h, axis : axis + 3] = (2.5, 1.8, 1.0)[(h + n) % 3]
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            layer.weight.normal_(0, 1 / math.sqrt(layer.in_features))
    for layer, gain in ((visual.merger.mlp[0], 1.0), (visual.merger.mlp[2], 0.3)):
        layer.weight.normal_(0, gain / math.sqrt(layer.in_features))
    visual.patch_embed.proj.weight.normal_(0, 2 / math.sqrt(visual.patch_embed.proj.weight[0].numel()))


class CopyModel(nn.Module):
    """The tower as the Trainer sees it in stage 1, beside what it copies.

    Cells that show something are far from the mean of their batch; they weigh more than the plain ground around them.
    """

    def __init__(self, visual, base: LlavaForConditionalGeneration, sample: Tensor):
        """``sample``: uint8 pictures [B, 3, 96, 96] that tell what a place and a channel are like on average."""
        super().__init__()
        self.visual = visual
        self.teacher = [base.model.vision_tower, base.model.multi_modal_projector]  # in a list: no part of this module
        self.layer = base.config.vision_feature_layer
        seen = torch.cat([self.features(part) for part in sample.split(32)])
        self.register_buffer("place", seen.mean(0), persistent=False)
        self.register_buffer("scale", (seen - self.place).flatten(0, 1).std(0), persistent=False)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What the base model's language model is given, [B, cells, C] in fp32."""
        tower, projector = (part.to(pixels.device) for part in self.teacher)  # no part of this module: goes along here
        seen = tower(normalize(pixels), output_hidden_states=True).hidden_states[self.layer][:, 1:]
        return projector(seen).float()

    def forward(self, pixels: Tensor, num_items_in_batch=None) -> dict[str, Tensor]:
        """uint8 pictures [B, 3, 96, 96] → loss and, per picture, the share of the variance that is missed."""
        wanted = self.features(pixels) - self.place
        far = (wanted / self.scale).square().mean(-1)
        weight = (far / far.mean()).clamp(0.1, 4.0)
        wanted = wanted + self.place.mean(0)
        frames = pixels[:, None]
        got = self.visual(to_patches(frames), grid_thw=grid_of(frames)).pooler_output.float().view_as(wanted)
        miss = ((got - wanted) / self.scale).square().mean(-1)
        loss = (weight * miss).sum() / weight.sum()
        return {"loss": loss, "missed": miss.mean(1).detach() / far.mean(1)}


class QwenAnswerModel(nn.Module):
    """The stock model as the Trainer sees it: a plain module, for the reason that `tiny_llava.AnswerModel` gives."""

    def __init__(self, qwen: Qwen2_5_VLForConditionalGeneration):
        super().__init__()
        self.qwen = qwen

    def forward(self, labels, num_items_in_batch=None, **inputs):
        """What `QwenCollator` makes → loss."""
        return {"loss": self.qwen(**inputs, labels=labels, use_cache=False).loss}


def train_copy(recipe: QwenRecipe, folder: Path, model, base, pairs: list[tuple] | None, resume: bool) -> None:
    """Stage 1: the tower of ``model`` in place; its weights are stored as ``tower.pt``."""
    done = folder / "tower.pt"
    if resume and done.exists():
        model.model.visual.load_state_dict(torch.load(done, map_location="cpu", weights_only=True))
        return
    seed = TRAINING_SEED + recipe.seed
    full = replace(TOWER_SCENES, objects=(3, 6))  # most of a picture is ground, which is learnt at once
    configs = (SceneConfig(), full, full, SceneConfig(sizes=(11, 43), objects=(1, 2)))
    dataset = ViewDataset(seed, recipe.copy_steps * recipe.copy_batch, configs, pairs)
    validation = ViewDataset(VALIDATION_SEED, recipe.validation_images, (SceneConfig(),))
    measure = Measure(lambda m: measure_copy(m, validation), recipe.measure_every)
    args = settings(
        folder, recipe.copy_steps, recipe.copy_batch, recipe.copy_rate, seed, save_steps=recipe.save_every,
        label_names=[], warmup_steps=min(50, recipe.copy_steps // 5),
    )  # fmt: skip
    sample = collate_views([validation[i] for i in range(len(validation))])["pixels"]
    train(CopyModel(model.model.visual, base, sample), args, dataset, collate_views, measure, resume)
    torch.save(model.model.visual.state_dict(), done)


@torch.no_grad()
def measure_copy(model: CopyModel, dataset, batch_size: int = 32) -> dict[str, float]:
    """Share of the variance of the wanted features that the tower explains, mean over pictures."""
    batches = [range(s, min(s + batch_size, len(dataset))) for s in range(0, len(dataset), batch_size)]
    pictures = (collate_views([dataset[i] for i in batch])["pixels"] for batch in batches)
    missed = [model(part.to(model.place.device))["missed"] for part in pictures]
    return {"explained": 1 - float(torch.cat(missed).mean())}


def train_answers(recipe: QwenRecipe, folder: Path, model, tokenizer, pairs: list[tuple] | None, resume: bool) -> None:
    """Stage 2: all of ``model``, in place."""
    seed = TRAINING_SEED + recipe.seed + 1
    dataset = QwenDataset(
        seed,
        recipe.answer_steps * recipe.batch,
        recipe.questions,
        recipe.batch,
        recipe.easy_steps * recipe.batch,
        pairs,
    )
    args = settings(
        folder, recipe.answer_steps, recipe.batch, recipe.answer_rate, seed, save_steps=recipe.save_every,
        label_names=["labels"], warmup_steps=min(50, recipe.answer_steps // 5),
    )  # fmt: skip
    measure = Measure(lambda m: measure_qwen(m.qwen, recipe, tokenizer), recipe.measure_every)
    train(QwenAnswerModel(model), args, dataset, QwenCollator(tokenizer), measure, resume)


def measure_qwen(model, recipe: QwenRecipe, tokenizer) -> dict[str, float]:
    """Accuracy per kind on validation scenes and, as ``clips`` and ``clips-…``, on validation clips."""
    collator, found = QwenCollator(tokenizer), {}
    for only, prefix in (("scenes", ""), ("clips", "clips-")):
        dataset = QwenDataset(VALIDATION_SEED, recipe.validation_images, recipe.questions, only=only)
        measured = measure_answers(model, dataset, collator, batch_size=16)
        found |= {f"{prefix}{kind}": value for kind, value in measured.items()}
    return found


def train_tiny_qwen(recipe: QwenRecipe, base: Path, output: Path, work: Path, resume: bool = True) -> Path:
    """Train from the tiny-llava in the folder ``base`` and save model, processor and plot under ``output``.

    ``work`` holds checkpoints; with ``resume`` a run that was cut off goes on from the last one.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    processor = qwen_processor()
    llava = LlavaForConditionalGeneration.from_pretrained(base).eval()
    model = build_qwen(recipe, llava, processor.tokenizer)
    pairs = easy_vqa_pairs() if recipe.easy_vqa else None
    train_copy(recipe, work / "copy", model, llava, pairs, resume)
    train_answers(recipe, work / "answers", model, processor.tokenizer, pairs, resume)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    plot([work / "copy", work / "answers"], output / "training.png")
    return output
