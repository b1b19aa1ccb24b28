# SPDX-License-Identifier: Apache-2.0
"""The recipe of tiny-clip: an open_clip model whose tower starts from tiny-llava's, taught to find videos by text.

All blocks but the last are locked, as open_clip locks towers: their patches know colours and shapes already, so what they
make of a set of videos is computed once. What is learnt is what the CLS token gathers from it and the whole text side,
with open_clip's own contrastive loss between a caption and the mean of its video's frames, or of its segments where the
tower clusters.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import default_data_collator

from ..attach import compress
from ..methods.centerclip import CenterClip
from ..ops.segments import video_embedding
from .retrieval import VIDEOS, build_tokenizer, distinct_videos, make_video, pixels, recalls, words
from .runs import Measure, plot, settings, train
from .video_scenes import VideoConfig

TRAINING_SEED, VALIDATION_SEED, TEST_SEED = 51_000_000, 52_000_000, 53_000_000
CONTEXT, LAYERS = 16, 5
MODEL_CONFIG = {
    "embed_dim": 128,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": LAYERS, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": CONTEXT, "vocab_size": len(words()), "width": 128, "heads": 4, "layers": 2,
        "hf_tokenizer_name": "tiny-clip",
    },
}  # fmt: skip
PIXELS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class ClipRecipe:
    """Everything that decides the outcome, besides the base model and the machine.

    ``frames``: of every video, this many are drawn at random for training. ``segments`` and ``keep``: train with
    CenterCLIP in place, on all frames.
    """

    seed: int = 0
    videos: int = 3000
    steps: int = 400
    batch: int = 64
    frames: int = 4
    rate: float = 1e-3
    segments: int | None = None
    keep: int = 16
    video: VideoConfig = VIDEOS
    validation_videos: int = 128
    measure_every: int = 100
    save_every: int = 100
    threads: int | None = field(default=None, compare=False)

    @property
    def method(self) -> CenterClip | None:
        """What acts in the tower while it is trained."""
        if self.segments is None:
            return None
        return CenterClip(keep=self.keep, frames=self.video.frames, segments=self.segments)


def build_clip(base: Path, recipe: ClipRecipe) -> CLIP:
    """A model of :data:`MODEL_CONFIG` with the tower of the tiny-llava in ``base``; text side and projections are new."""
    torch.manual_seed(recipe.seed)
    model = CLIP(**{name: dict(v) if isinstance(v, dict) else v for name, v in MODEL_CONFIG.items()})
    found = load_file(base / "model.safetensors")
    tower = {k.removeprefix("vision_tower."): v for k, v in found.items() if k.startswith("vision_tower.")}
    weights = model.visual.state_dict()
    weights.update(_renamed(tower, weights["positional_embedding"].shape[0] - 1))
    model.visual.load_state_dict(weights)
    model.visual.requires_grad_(False)
    for part in (model.visual.transformer.resblocks[-1], model.visual.ln_post):
        part.requires_grad_(True)
    model.visual.proj.requires_grad_(True)
    return model


def _renamed(tower: dict[str, Tensor], patches: int) -> dict[str, Tensor]:
    """Weights of a CLIP tower of transformers under open_clip's names, for a smaller picture of ``patches`` patches.

    Its patches take the places of a corner of the larger grid: things stay as large in pixels.
    """
    place = tower["embeddings.position_embedding.weight"]
    old, new = (round(n**0.5) for n in (len(place) - 1, patches))
    corner = place[1:].view(old, old, -1)[:new, :new].flatten(0, 1)
    found = {
        "class_embedding": tower["embeddings.class_embedding"],
        "conv1.weight": tower["embeddings.patch_embedding.weight"],
        "positional_embedding": torch.cat([place[:1], corner]),
    }
    for part in ("weight", "bias"):
        found[f"ln_pre.{part}"] = tower[f"pre_layrnorm.{part}"]
        found[f"ln_post.{part}"] = tower[f"post_layernorm.{part}"]
        names = {
            "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
            "ln_1": "layer_norm1", "ln_2": "layer_norm2",
        }  # fmt: skip
        for layer in range(LAYERS):
            theirs, ours = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
            joined = [tower[f"{theirs}self_attn.{name}_proj.{part}"] for name in "qkv"]
            found[f"{ours}attn.in_proj_{part}"] = torch.cat(joined)
            for name, source in names.items():
                found[f"{ours}{name}.{part}"] = tower[f"{theirs}{source}.{part}"]
    return found


def locked_features(clip: CLIP, seed: int, recipe: ClipRecipe, batch: int = 64) -> dict[str, Tensor]:
    """What the locked blocks make of the videos of one series, and their captions.

    ``features`` [N, T, 1 + n, C] fp16, T frames or segments; ``text`` [N, context].
    """
    tokenizer, method, made = build_tokenizer(), recipe.method, []
    captions = []
    with nullcontext() if method is None else compress(clip, method), torch.no_grad():
        for start in range(0, recipe.videos, batch):
            videos = [make_video(seed, i, recipe.video) for i in range(start, min(start + batch, recipe.videos))]
            captions += [video.caption for video in videos]
            frames = [
                v.frames if method else some_frames(v.frames, seed, start + i, recipe.frames)
                for i, v in enumerate(videos)
            ]
            x = before_last(clip, pixels(frames).flatten(0, 1))
            made.append(x.unflatten(0, (len(videos), -1)).half())
    return {"features": torch.cat(made), "text": tokenized(tokenizer, captions)}


def some_frames(frames: np.ndarray, seed: int, index: int, count: int) -> np.ndarray:
    """``count`` of ``frames`` drawn at random, in their order."""
    rng = np.random.default_rng((seed, index, 4))
    return frames[np.sort(rng.permutation(len(frames))[:count])]


def before_last(clip: CLIP, pixel_values: Tensor) -> Tensor:
    """[V, 1 + n, C] what reaches the last block of the tower."""
    seen: list[Tensor] = []
    hook = clip.visual.transformer.resblocks[-1].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    try:
        clip.encode_image(pixel_values)
    finally:
        hook.remove()
    return seen[0]


def read_out(clip: CLIP, x: Tensor) -> Tensor:
    """[V, E] what ``encode_image`` makes of the input ``x`` [V, 1 + n, C] of the last block: its CLS row alone."""
    tower = clip.visual
    block = tower.transformer.resblocks[-1]
    y = block.ln_1(x)
    row = x[:, :1] + block.attn(y[:, :1], y, y, need_weights=False)[0]
    row = row + block.mlp(block.ln_2(row))
    return tower.ln_post(row[:, 0]) @ tower.proj


class FeatureDataset(Dataset):
    """Rows of what :func:`locked_features` returns, in a new order for every round."""

    def __init__(self, found: dict[str, Tensor], count: int, seed: int):
        rows, generator = len(found["text"]), torch.Generator().manual_seed(seed)
        rounds = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
        self.order, self.found = torch.cat(rounds)[:count], found

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[self.order[index]] for name, value in self.found.items()}


def tokenized(tokenizer, captions: list[str]) -> Tensor:
    """[N, context] token ids."""
    return tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids


class VideoTextModel(nn.Module):
    """The open_clip model as the Trainer sees it."""

    def __init__(self, clip: CLIP):
        super().__init__()
        self.clip = clip
        self.contrast = ClipLoss()

    def forward(self, features: Tensor, text: Tensor, num_items_in_batch=None) -> dict[str, Tensor]:
        """Rows of what `locked_features` returns → loss."""
        video = mean_embedding(read_out(self.clip, features.flatten(0, 1).float()), len(features))
        caption = F.normalize(self.clip.encode_text(text), dim=-1)
        return {"loss": self.contrast(video, caption, self.clip.logit_scale.exp().clamp(max=100))}


def mean_embedding(rows: Tensor, videos: int) -> Tensor:
    """[B, E] unit vectors: the mean of each of B ``videos``' rows of ``rows`` [B · T, E]."""
    return video_embedding(rows, torch.ones(videos, len(rows) // videos, dtype=torch.bool, device=rows.device))


@torch.no_grad()
def measure_clip(clip: CLIP, seed: int, recipe: ClipRecipe, batch: int = 32) -> dict[str, float]:
    """Recalls, as shares, on videos of distinct captions; every frame is read, as the recipe trains."""
    was = clip.training
    clip.eval()
    videos = distinct_videos(seed, recipe.validation_videos, recipe.video)
    shown = []
    with nullcontext() if recipe.method is None else compress(clip, recipe.method):
        for start in range(0, len(videos), batch):
            part = videos[start : start + batch]
            rows = clip.encode_image(pixels([v.frames for v in part]).flatten(0, 1))
            shown.append(mean_embedding(rows, len(part)))
    told = F.normalize(clip.encode_text(tokenized(build_tokenizer(), [v.caption for v in videos])), dim=-1)
    clip.train(was)
    return {name: value / 100 for name, value in recalls(told, torch.cat(shown)).items()}


def train_tiny_clip(recipe: ClipRecipe, base: Path, output: Path, work: Path, resume: bool = True) -> Path:
    """Train on the tower of the model folder ``base`` and save an open_clip folder under ``output``.

    ``work`` holds checkpoints; with ``resume`` a run that was cut off goes on from the last one.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    model, seed, folder = build_clip(base, recipe), TRAINING_SEED + recipe.seed, work / "contrast"
    path = work / "features.safetensors"
    work.mkdir(parents=True, exist_ok=True)
    if not (resume and path.exists()):
        save_file(locked_features(model, seed, recipe), path)
    args = settings(
        folder, recipe.steps, recipe.batch, recipe.rate, seed, save_steps=recipe.save_every, bf16=False,
        dataloader_num_workers=0, dataloader_persistent_workers=False, weight_decay=0.1,
    )  # fmt: skip
    measure = Measure(lambda m: measure_clip(m.clip, VALIDATION_SEED, recipe), recipe.measure_every)
    data = FeatureDataset(load_file(path), recipe.steps * recipe.batch, seed)
    train(VideoTextModel(model), args, data, default_data_collator, measure, resume)
    save(model, output)
    plot([folder], output / "training.png")
    return output


def save(model: CLIP, output: Path) -> None:
    """Weights in half precision, configuration and tokenizer, as ``open_clip`` reads a ``local-dir:``."""
    output.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, output / "open_clip_model.safetensors", metadata={"format": "pt"})
    config = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": PIXELS}
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    build_tokenizer().save_pretrained(output)
