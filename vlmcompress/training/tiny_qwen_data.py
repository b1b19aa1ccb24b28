# SPDX-License-Identifier: Apache-2.0
"""What tiny-qwen2.5-vl reads: its processor, pictures and clips at their own resolution, and its collators."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from .data import IGNORED, QuestionCollator, normalize, to_pixels
from .processor import build_tokenizer, words
from .questions import ask
from .scenes import SceneConfig, make_scene
from .video_scenes import VideoConfig, ask_video, make_clip, video_vocabulary

PATCH, MERGE, FRAMES = 4, 2, 2  # pixels of a patch, patches of a token per side, frames of a token
CELL = PATCH * MERGE
SIDES = (32, 40, 48, 56, 64, 72, 80, 88)  # heights that a share of the pictures is scaled to
VISUAL = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
}  # fmt: skip
# places are what the language model has to learn anew; digits come with it
WEIGHTS = {
    "color": 1.0, "shape": 1.0, "count": 1.5, "existence": 1.2, "position": 1.6, "relation": 1.4, "digit": 1.0,
}  # fmt: skip
PIXELS = {"shortest_edge": 4 * CELL**2, "longest_edge": 576 * CELL**2}  # 4 to 576 tokens per image or frame
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def qwen_words() -> list[str]:
    """tiny-llava's vocabulary in id order, Qwen's special tokens and the words of clips in its unused places."""
    found = [VISUAL["image_token"] if word == "<image>" else word for word in words()]
    free = (i for i, word in enumerate(found) if word.startswith("<unused"))
    for word in [*list(VISUAL.values())[1:], *video_vocabulary()]:
        if word not in found:
            found[next(free)] = word
    return found


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(qwen_words(), VISUAL)


def qwen_processor() -> Qwen2_5_VLProcessor:
    """The stock processor: pictures and frames of their own size, rounded to tokens of 8 × 8 pixels."""
    sizes = dict(
        patch_size=PATCH, merge_size=MERGE, temporal_patch_size=FRAMES, size=PIXELS,
        image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5],
    )  # fmt: skip
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes), tokenizer=qwen_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False), chat_template=TEMPLATE,
    )  # fmt: skip


def to_patches(frames: torch.Tensor) -> torch.Tensor:
    """uint8 frames [B, T, 3, H, W], or a picture for T = 1, as the processor cuts them: [B · patches, 96].

    The patches of one token follow each other; a picture fills both frames of its tokens.
    """
    if frames.shape[1] == 1:
        frames = frames.expand(-1, FRAMES, -1, -1, -1)
    b, t, c, h, w = frames.shape
    cut = normalize(frames).reshape(b, t // FRAMES, FRAMES, c, h // CELL, MERGE, PATCH, w // CELL, MERGE, PATCH)
    return cut.permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9).reshape(-1, c * FRAMES * PATCH**2)


def grid_of(frames: torch.Tensor) -> torch.Tensor:
    """``grid_thw`` [B, 3] of frames [B, T, 3, H, W]: the grid of patches."""
    b, t, _, h, w = frames.shape
    return torch.tensor([[max(1, t // FRAMES), h // PATCH, w // PATCH]], device=frames.device).repeat(b, 1)


class ViewDataset(Dataset):
    """Pictures of 96 × 96 for the first stage: scenes, a quarter of them easy-VQA's training split where it is given."""

    def __init__(self, seed: int, length: int, configs: tuple[SceneConfig, ...], easy_vqa: list[tuple] | None = None):
        self.seed, self.length, self.configs, self.easy_vqa = seed, length, configs, easy_vqa

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, i, 1))
        if self.easy_vqa and rng.random() < 0.25:
            image = self.easy_vqa[int(rng.integers(len(self.easy_vqa)))][0]
            return to_pixels(image.resize((96, 96), Image.Resampling.BICUBIC))
        return to_pixels(make_scene(self.seed, i, self.configs[i % len(self.configs)]).image)


def collate_views(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """uint8 [B, 3, 96, 96]."""
    return {"pixels": torch.stack(items)}


class QwenDataset(Dataset):
    """Pictures and clips with several question-answer pairs each; ``batch`` items in a row are of one size and sort.

    Of ten such runs five are scenes as they are, one is scenes scaled down, one easy-VQA (native 64 × 64 or scaled down;
    scenes where it is not given), three are clips. ``only`` makes all of one sort: "scenes" or "clips". In the first
    ``easy_until`` items a clip holds at most two things.
    """

    def __init__(
        self, seed: int, length: int, questions: int, batch: int = 1, easy_until: int = 0,
        easy_vqa: list[tuple] | None = None, only: str | None = None, video: VideoConfig | None = None,
    ):  # fmt: skip
        self.seed, self.length, self.questions, self.batch, self.only = seed, length, questions, batch, only
        self.easy_until, self.easy_vqa, self.video = easy_until, easy_vqa, video or VideoConfig()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng((self.seed, i, 1))
        run = np.random.default_rng((self.seed, i // self.batch, 4))  # the same for all items of a run
        turn, side, narrower = int(run.integers(10)), int(run.choice(SIDES)), CELL * int(run.integers(2))
        turn = {"scenes": 0, "clips": 9, None: turn}[self.only]
        if turn >= 7:
            clip = make_clip(self.seed, i, self.video, max_objects=2 if i < self.easy_until else None)
            frames, qas = clip.frames, ask_video(clip, rng, self.questions)
        elif turn == 6 and self.easy_vqa:
            image, found = self.easy_vqa[int(rng.integers(len(self.easy_vqa)))]
            qas = [found[j] for j in rng.permutation(len(found))[: self.questions]]
            frames = (image if run.random() < 0.6 else _scaled(image, side // MERGE // CELL * CELL, narrower),)
        else:
            scene = make_scene(self.seed, i)
            qas = ask(scene, rng, self.questions, WEIGHTS)
            frames = (_scaled(scene.image, side, narrower) if turn == 5 else scene.image,)
        return {"frames": torch.stack([to_pixels(frame) for frame in frames]), "qas": qas, "index": i}


def _scaled(image: Image.Image, side: int, narrower: int) -> Image.Image:
    return image.resize((max(MERGE * CELL, side - narrower), side), Image.Resampling.BICUBIC)


class QwenCollator(QuestionCollator):
    """`QuestionCollator` for Qwen's prompts: vision start and end, and positions [S, 3] of time, row and column."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, 0, augment=0.0)
        names = ("image_token", "video_token", "vision_bos_token", "vision_eos_token")
        self.image_id, self.video_id, self.start_id, self.stop_id = (
            tokenizer.convert_tokens_to_ids(VISUAL[name]) for name in names
        )

    def images(self, items: list[dict]) -> dict[str, torch.Tensor]:
        frames = torch.stack([item["frames"] for item in items])
        video = frames.shape[1] > 1
        return {
            "pixel_values_videos" if video else "pixel_values": to_patches(frames),
            "video_grid_thw" if video else "image_grid_thw": grid_of(frames),
        }

    def encode(self, item: dict) -> dict[str, np.ndarray]:
        """ids, labels, block [S] and positions [S, 3] of one item; a step in time counts like one in space."""
        t, h, w = grid_of(item["frames"][None])[0].tolist()
        t, h, w = t, h // MERGE, w // MERGE
        pad = self.image_id if len(item["frames"]) == 1 else self.video_id
        ids = [self.tokenizer.bos_token_id, self.start_id, *[pad] * (t * h * w), self.stop_id]
        start = 2 + max(h, w)  # the stock model lets the text start behind the larger side, however long a clip is
        cells = 2 + np.stack(np.meshgrid(range(t), range(h), range(w), indexing="ij"), -1).reshape(-1, 3)
        pairs = self.pairs(item["qas"], start + 1)
        positions = [[[0] * 3, [1] * 3], cells, [[start] * 3], pairs["positions"][:, None].repeat(3, 1)]
        nothing = np.full(len(ids), IGNORED)
        return {
            "ids": np.concatenate([ids, pairs["ids"]]), "labels": np.concatenate([nothing, pairs["labels"]]),
            "positions": np.concatenate(positions), "block": np.concatenate([0 * nothing, pairs["block"]]),
        }  # fmt: skip

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(items)
        return {**batch, "position_ids": batch["position_ids"].permute(2, 0, 1)}
