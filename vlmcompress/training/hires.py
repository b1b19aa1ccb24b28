# SPDX-License-Identifier: Apache-2.0
"""Scenes of up to 192 × 192 pixels for tiled models, and the tiles and questions of a training sample.

The things are as large in pixels as those of `scenes`, so a tile of 96 pixels shows them as tiny-llava saw them. In the
thumbnail, which squeezes the canvas into one tile, no digit can be read and small shapes run together, while places
and colours of larger things remain: some questions need the crops, others are about the whole image.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from .data import KIND_WEIGHTS, QuestionCollator
from .questions import QA, ask
from .scenes import SceneConfig, make_scene

TILE = 96
PINPOINTS = [[96, 192], [192, 96], [192, 192]]  # (height, width) of what tiles may make up
# width, height, objects. The larger side is a pinpoint's, so that no image is scaled and digits stay on the patch grid;
# 144 leaves padding that the model cuts off again. A third has four full tiles, a third two, a third four with padding.
_SHAPES = (
    (192, 192, (3, 7)), (192, 96, (2, 5)), (192, 144, (3, 6)),
    (192, 192, (3, 7)), (96, 192, (2, 5)), (144, 192, (3, 6)),
)  # fmt: skip
HIRES = tuple(
    SceneConfig(
        canvas=width, height=height, objects=objects, sizes=(12, 36), digit_share=0.9, label_share=0.9, grain=0.0,
        tile=TILE,
    )
    for width, height, objects in _SHAPES
)  # fmt: skip
# digits, the surest sign that a crop was seen, three times as often as what the thumbnail may tell
HIRES_WEIGHTS = {
    "color": 1.0, "shape": 2.0, "count": 1.0, "existence": 1.0, "position": 1.0, "relation": 1.0, "digit": 3.0,
}  # fmt: skip
# in training digits, which come with tiny-llava, give way to what has to be learnt: places and counts in a picture shown
# twice
TRAINING_WEIGHTS = {
    "color": 0.8, "shape": 1.5, "count": 1.5, "existence": 1.2, "position": 1.6, "relation": 1.2, "digit": 1.2,
}  # fmt: skip


class TiledDataset(Dataset):
    """Images as the LLaVA-NeXT processor cuts them, with several question-answer pairs each.

    ``batch`` items in a row are of one size, so that batches hold no padding: of every ten such runs eight are hires
    scenes, one is `scenes` (96 × 96) and one is easy-VQA's training split, where ``easy_vqa`` is given. ``small_until``
    items at the start are of the sizes with two tiles or fewer, which cost half. ``weights`` give the share of each kind
    of question on hires scenes.
    """

    def __init__(
        self, seed: int, length: int, processor, questions: int, batch: int = 1, small_until: int = 0,
        easy_vqa: list[tuple] | None = None, plain: bool = True, weights: dict[str, float] = TRAINING_WEIGHTS,
    ):  # fmt: skip
        self.seed, self.length, self.processor, self.questions = seed, length, processor, questions
        self.batch, self.small_until, self.easy_vqa, self.plain = batch, small_until, easy_vqa, plain
        self.weights = weights

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        image, qas = self.sample(i)
        seen = self.processor(images=image, text="<image>", return_tensors="pt")
        tokens = int((seen["input_ids"] == self.processor.image_token_id).sum())
        return {
            "pixels": seen["pixel_values"][0], "size": seen["image_sizes"][0], "image_tokens": tokens, "qas": qas,
            "index": i,
        }  # fmt: skip

    def sample(self, i: int) -> tuple:
        """Image ``i`` and its pairs."""
        rng = np.random.default_rng((self.seed, i, 1))
        run = np.random.default_rng((self.seed, i // self.batch, 4))  # the same for all items of a run
        turn, config = int(run.integers(10)), HIRES[int(run.integers(len(HIRES)))]
        if self.easy_vqa and turn == 0:
            image, found = self.easy_vqa[int(rng.integers(len(self.easy_vqa)))]
            return image, [found[j] for j in rng.permutation(len(found))[: self.questions]]
        weights = self.weights
        if self.plain and turn == 1:
            config, weights = SceneConfig(), KIND_WEIGHTS
        elif i < self.small_until:
            config = HIRES[1] if run.random() < 0.5 else HIRES[4]
        scene = make_scene(self.seed, i, config)
        return scene.image, ask(scene, rng, self.questions, weights)


class TiledCollator(QuestionCollator):
    """`QuestionCollator` for tiled images: each has its own number of image tokens, and of tiles."""

    def __init__(self, tokenizer, seed: int = 0, augment: float = 0.5):
        super().__init__(tokenizer, 0, seed, augment)

    def count(self, item: dict) -> int:
        return item["image_tokens"]

    def images(self, items: list[dict]) -> dict[str, torch.Tensor]:
        pixels = torch.nn.utils.rnn.pad_sequence([item["pixels"] for item in items], batch_first=True)
        return {"pixel_values": pixels, "image_sizes": torch.stack([item["size"] for item in items])}


def easy_vqa_pairs() -> list[tuple]:
    """Images of easy-VQA's training split as they are, each with its pairs."""
    from vlmcompress.eval.tasks import load

    found: dict[int, tuple] = {}
    for sample in load("easy-vqa", split="train"):
        pairs = found.setdefault(id(sample.image), (sample.image, []))[1]
        pairs.append(QA(sample.question, sample.answer, sample.kind))
    return list(found.values())
