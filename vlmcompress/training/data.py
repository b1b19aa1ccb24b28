# SPDX-License-Identifier: Apache-2.0
"""Training data: scenes with captions (stage 1), scenes and easy-VQA with questions (stages 2 and 3), the collators.

Item ``i`` of a dataset depends on the seed and on ``i`` alone, and the Trainer reads the items in order. So a resumed
run sees what an unbroken one would have seen, and a curriculum is a function of ``i``.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from .questions import QA, ask, caption
from .scenes import Scene, SceneConfig, make_scene, patch_labels

KIND_WEIGHTS = {
    "color": 1.0, "shape": 1.0, "count": 1.5, "existence": 1.3, "position": 0.8, "relation": 1.0, "digit": 1.5,
}  # fmt: skip
IGNORED = -100
PATCH_LABELS = ("color", "kind", "digit")


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1], as the processor does."""
    return pixels.float() / 127.5 - 1


def tower_labels(scene: Scene, patch: int, seed: tuple[int, ...]) -> dict:
    """Caption and patch labels of a scene."""
    return {"caption": caption(scene, np.random.default_rng((*seed, 3))), **patch_labels(scene, patch)}


class CaptionDataset(Dataset):
    """Scenes with a caption and patch labels; each fourth one holds few and large things, as easy-VQA's images do."""

    def __init__(self, seed: int, length: int, config: SceneConfig, patch: int):
        self.seed, self.length, self.patch = seed, length, patch
        large = (config.sizes[0], int(config.canvas * 0.45))
        self.configs = [replace(config, sizes=large, objects=(1, 2)), config, config, config]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        scene = make_scene(self.seed, i, self.configs[i % 4])
        return {"pixels": to_pixels(scene.image), **tower_labels(scene, self.patch, (self.seed, i))}


class CaptionCollator:
    """Batches for stage 1; captions are padded on the right, as CLIP's text model expects."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        texts = [item["caption"] + " </s>" for item in items]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = {k: torch.from_numpy(np.stack([item[k] for item in items])).flatten(1) for k in PATCH_LABELS}
        pixels = normalize(torch.stack([item["pixels"] for item in items]))
        return {
            "pixel_values": pixels, **labels,
            "caption_ids": tokens["input_ids"], "caption_mask": tokens["attention_mask"],
        }  # fmt: skip


class EasyVQA:
    """easy-VQA's images at the model's size, with their questions: ``pixels[i]`` uint8, ``questions[i]`` list of QA."""

    def __init__(self, split: str, image_processor):
        from easy_vqa import get_test_image_paths, get_test_questions, get_train_image_paths, get_train_questions

        paths, read = {
            "train": (get_train_image_paths, get_train_questions),
            "test": (get_test_image_paths, get_test_questions),
        }[split]
        asked: dict[int, dict[str, str]] = defaultdict(dict)
        for question, answer, index in zip(*read(), strict=True):
            asked[index][question] = answer
        self.questions = [[QA(q, a, "easy-vqa") for q, a in asked[i].items()] for i in sorted(asked)]
        images = [Image.open(paths()[i]).convert("RGB") for i in sorted(asked)]
        plain = image_processor(images, do_rescale=False, do_normalize=False, return_tensors="pt")
        self.pixels = plain["pixel_values"].round().clamp(0, 255).to(torch.uint8)


class QuestionDataset(Dataset):
    """Images with several question-answer pairs each, scenes and a share of easy-VQA.

    For the first ``easy_until`` items a scene holds at most two objects: from scratch, a small model learns to look
    things up there, and hardly in crowded scenes. With ``patch`` the items carry the labels of stage 1 too.
    """

    def __init__(
        self, seed: int, length: int, config: SceneConfig, questions: int, easy_until: int = 0,
        easy_vqa: EasyVQA | None = None, easy_vqa_share: float = 0.0, patch: int = 0,
    ):  # fmt: skip
        self.seed, self.length, self.config, self.questions = seed, length, config, questions
        self.easy_until, self.easy_vqa, self.easy_vqa_share, self.patch = easy_until, easy_vqa, easy_vqa_share, patch

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        rng = np.random.default_rng((self.seed, i, 1))
        if self.easy_vqa is not None and rng.random() < self.easy_vqa_share:
            k = int(rng.integers(len(self.easy_vqa.questions)))
            found = self.easy_vqa.questions[k]
            qas = [found[j] for j in rng.permutation(len(found))[: self.questions]]
            return {"pixels": self.easy_vqa.pixels[k], "qas": qas, "index": i, **self._labels(None, i)}
        scene = make_scene(self.seed, i, self.config, max_objects=2 if i < self.easy_until else None)
        qas = ask(scene, rng, self.questions, KIND_WEIGHTS)
        return {"pixels": to_pixels(scene.image), "qas": qas, "index": i, **self._labels(scene, i)}

    def _labels(self, scene: Scene | None, i: int) -> dict:
        """Labels for the tower where they are asked for; easy-VQA has none."""
        if not self.patch:
            return {}
        if scene is None:
            grid = self.config.canvas // self.patch
            return {"caption": "", **{name: np.full((grid, grid), IGNORED) for name in PATCH_LABELS}}
        return tower_labels(scene, self.patch, (self.seed, i))


class QuestionCollator:
    """One sequence per image: ``<s>``, the image tokens, then the question-answer pairs, padded on the right.

    The mask lets a pair see the image and itself but no other pair, and each pair starts at the position after the
    image, so a pair trains what a prompt of one image and one question asks: no pair can copy from another. A 4D mask
    also keeps transformers from taking gaps in the positions for packed sequences.

    ``augment`` is the share of the samples whose positions are changed, see `augmented_positions`.
    """

    def __init__(self, tokenizer, image_tokens: int, seed: int = 0, augment: float = 0.5):
        self.tokenizer, self.image_tokens, self.seed, self.augment = tokenizer, image_tokens, seed, augment
        self.image_id, self.end_id = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.eos_token_id

    def count(self, item: dict) -> int:
        """Image tokens of an item."""
        return self.image_tokens

    def images(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """What the model is given of the images."""
        return {"pixel_values": normalize(torch.stack([item["pixels"] for item in items]))}

    def encode(self, item: dict) -> dict[str, np.ndarray]:
        """ids, labels, positions and block (0 = image, then 1, 2, … per pair) of one item, each of shape [S]."""
        image_tokens = self.count(item)
        ids = [self.tokenizer.bos_token_id] + [self.image_id] * image_tokens
        labels, block = [IGNORED] * len(ids), [0] * len(ids)
        rng = np.random.default_rng((self.seed, item["index"], 2))
        image_positions, start = np.arange(len(ids)), len(ids)
        if rng.random() < self.augment:
            image_positions, start = augmented_positions(rng, image_tokens)
        shown = {"ids": ids, "labels": labels, "positions": image_positions, "block": block}
        return {name: np.concatenate([shown[name], column]) for name, column in self.pairs(item["qas"], start).items()}

    def pairs(self, qas: list[QA], start: int) -> dict[str, np.ndarray]:
        """What `encode` returns, of the pairs alone; each starts at position ``start``."""
        ids, labels, positions, block = [], [], [], []
        texts = self.tokenizer([qa.question for qa in qas], add_special_tokens=False)["input_ids"]
        for n, (question, qa) in enumerate(zip(texts, qas, strict=True)):
            answer = self.tokenizer.convert_tokens_to_ids(qa.answer)
            # the end of the answer is learnt at once, so one pair in each sequence is enough to keep it
            end = self.end_id if n == 0 else IGNORED
            ids += [*question, answer, self.end_id]
            labels += [IGNORED] * len(question) + [answer, end]
            positions += range(start, start + len(question) + 2)
            block += [n + 1] * (len(question) + 2)
        columns = {"ids": ids, "labels": labels, "positions": positions, "block": block}
        return {name: np.array(column) for name, column in columns.items()}

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        rows = [self.encode(item) for item in items]
        length = max(len(row["ids"]) for row in rows)
        fill = {"ids": self.tokenizer.pad_token_id, "labels": IGNORED, "positions": 0, "block": -1}
        full = {}
        for name, value in fill.items():
            # along the sequence, the first axis
            padded = [np.pad(x, [(0, length - len(x)), *[(0, 0)] * (x.ndim - 1)], constant_values=value)
                      for x in (row[name] for row in rows)]  # fmt: skip
            full[name] = torch.from_numpy(np.stack(padded))
        return {
            "input_ids": full["ids"],
            "labels": full["labels"],
            "position_ids": full["positions"],
            "attention_mask": pair_mask(full["block"]),
            **self.images(items),
        }


class JointCollator:
    """Batches for stage 3: questions, and the captions and patch labels that keep the tower on its own task."""

    def __init__(self, questions: QuestionCollator):
        self.questions, self.captions = questions, CaptionCollator(questions.tokenizer)

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        return {**self.captions(items), **self.questions(items)}


def pair_mask(block: torch.Tensor) -> torch.Tensor:
    """Boolean mask [B, 1, S, S] from blocks [B, S]: causal, and only the image (block 0) and the own block are seen."""
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    return (causal & seen)[:, None]


def augmented_positions(rng, image_tokens: int) -> tuple[np.ndarray, int]:
    """Positions of <s> and the image tokens [1 + image_tokens], and where the text starts.

    A compressed prompt has its survivors renumbered or with gaps between them, and the text nearer or farther. A small
    model that addressed image tokens by distance would break there; large ones do not. So positions are squeezed into
    fewer places or spread out at random, always in order, and the text starts at a random distance behind them.
    """
    span = int(rng.integers(4, image_tokens + 1)) if rng.random() < 0.75 else 2 * image_tokens
    places = np.sort(rng.integers(1, span + 1, image_tokens))
    start = int(places[-1]) + 1 + (int(rng.integers(0, 24)) if rng.random() < 0.5 else 0)
    return np.concatenate([[0], places]), start
