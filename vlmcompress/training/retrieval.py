# SPDX-License-Identifier: Apache-2.0
"""Video scenes with captions, for text–video retrieval: coloured shapes that stay, move, appear or vanish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from .scenes import COLORS, SHAPES
from .video_scenes import EVENTS, Clip, VideoConfig, make_clip

#: two or three things in 8 frames of 64 × 64 pixels
VIDEOS = VideoConfig(objects=(2, 3))
#: deviation of the noise on every pixel of every frame, so that no two frames are equal
NOISE = 2.0
SPECIALS = ("<pad>", "<s>", "<unk>")
#: has the largest id, which is where open_clip's text tower reads
END = "</s>"


@dataclass(frozen=True)
class Video:
    """``frames`` [T, H, W, 3] uint8 and what happens in them."""

    frames: np.ndarray
    caption: str


def make_video(seed: int, index: int, config: VideoConfig = VIDEOS) -> Video:
    """Draw video ``index`` of the series ``seed``."""
    clip = make_clip(seed, index, config)
    stack = np.stack([np.asarray(frame) for frame in clip.frames])
    noise = np.random.default_rng((seed, index, 3)).normal(0, NOISE, (*stack.shape[:3], 1))
    return Video((stack + noise).clip(0, 255).astype(np.uint8), caption(clip))


def caption(clip: Clip) -> str:
    """What a clip's things are and do. Ways and times are left out: a mean over frames cannot know their order."""
    return " and ".join(f"a {a.thing.color} {a.thing.kind} {a.event}" for a in clip.actors)


def distinct_videos(seed: int, count: int, config: VideoConfig = VIDEOS) -> list[Video]:
    """The first ``count`` videos of a series whose captions all differ."""
    found: dict[str, Video] = {}
    index = 0
    while len(found) < count:
        video = make_video(seed, index, config)
        found.setdefault(video.caption, video)
        index += 1
    return list(found.values())


def pixels(frames: Sequence[np.ndarray]) -> Tensor:
    """[B, T, 3, H, W] in [-1, 1] of ``frames``, each [T, H, W, 3] uint8."""
    return torch.from_numpy(np.stack(frames)).permute(0, 1, 4, 2, 3).float().div_(127.5).sub_(1)


def words() -> list[str]:
    """The vocabulary in id order."""
    return [*SPECIALS, "a", "and", *COLORS, *SHAPES, *EVENTS, END]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that puts <s> in front of a text and </s> behind it."""
    ids = {word: number for number, word in enumerate(words())}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[?!.,:;\"']"), " ")])
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", ids["<s>"]), (END, ids[END])]
    core.post_processor = processors.TemplateProcessing(f"<s> $A {END}", None, ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=END, pad_token="<pad>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=32,
    )  # fmt: skip


def recalls(text: Tensor, video: Tensor, ranks: tuple[int, ...] = (1, 5)) -> dict[str, float]:
    """Share of queries whose own counterpart is among the best ``ranks``, in per cent, for both directions.

    ``text`` and ``video`` [N, E] unit vectors, row by row of the same pair. A counterpart that ties with another one
    stands behind it, so that a model that makes everything alike does not score.
    """
    found = {}
    for name, scores in (("text_to_video", text @ video.T), ("video_to_text", video @ text.T)):
        place = (scores >= scores.diagonal()[:, None]).sum(1)
        for rank in ranks:
            found[f"{name}_r{rank}"] = 100 * (place <= rank).double().mean().item()
    return found
