# SPDX-License-Identifier: Apache-2.0
"""Tasks: images, one question each, one-word answers. `load` reads a task, `score` marks an answer."""

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent
REGISTRY: dict[str, Callable[[str], list["Sample"]]] = {}


@dataclass(frozen=True)
class Sample:
    """One question about one image, or about one video: then ``image`` is the tuple of its frames.

    ``kind`` is the sort of question, for stratified subsets and tables.
    """

    id: str
    image: Image.Image | tuple[Image.Image, ...]
    question: str
    answer: str
    kind: str

    #: greedy decoding of this question: new tokens (None: as many as the run allows), strings that end the answer
    max_new_tokens = None
    until = ()

    def chat(self) -> list[dict[str, Any]]:
        """The question as a chat, see :func:`vlmcompress.eval.loading.encode_chats`."""
        from ..loading import turn

        return turn(self.question, self.image)

    def mark(self, prediction: str) -> dict[str, Any]:
        """What the answer earns: ``correct``, from 0 to 1."""
        return {"correct": float(score(prediction, self.answer))}

    def aggregate(self, answers: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Metrics over all answers to the task, besides the mean of ``correct``, by name."""
        return {}

    @cached_property
    def picture(self) -> str:
        """Short digest of the picture: answers about one picture belong together in the statistics."""
        return digest(self.image)


def digest(image: Image.Image | tuple[Image.Image, ...]) -> str:
    """Twelve hexadecimal digits that stand for the pixels of a picture or of all frames of a video."""
    found = hashlib.sha1()
    for picture in (image,) if isinstance(image, Image.Image) else image:
        found.update(repr(picture.size).encode() + picture.tobytes())
    return found.hexdigest()[:12]


def register_task(name: str):
    """Register a function ``split -> list[Sample]`` as the task ``name``."""

    def add(reader: Callable[[str], list[Sample]]):
        REGISTRY[name] = reader
        return reader

    return add


def tasks() -> list[str]:
    """The names of the tasks that exist."""
    return sorted(REGISTRY)


def load(task: str, split: str = "test", limit: int | None = None, seed: int = 0) -> list[Sample]:
    """The samples of a task; with ``limit`` a seeded subset in which each kind keeps its share.

    Names that are not registered here are tasks of lmms-eval, or the YAML file of one.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if task in REGISTRY:
        samples = REGISTRY[task](split)
    else:
        from ..lmms.documents import load as load_foreign

        samples = load_foreign(task)
    return samples if limit is None or limit >= len(samples) else _subset(samples, limit, seed)


def _subset(samples: list[Sample], limit: int, seed: int) -> list[Sample]:
    """``limit`` samples in their own order, each kind by its share (largest remainders)."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sample in enumerate(samples):
        groups[sample.kind].append(i)
    rng = np.random.default_rng(seed)
    exact = {kind: limit * len(members) / len(samples) for kind, members in groups.items()}
    share = {kind: int(value) for kind, value in exact.items()}
    for kind in sorted(exact, key=lambda k: (share[k] - exact[k], k))[: limit - sum(share.values())]:
        share[kind] += 1
    chosen = [int(i) for kind in sorted(groups) for i in rng.permutation(groups[kind])[: share[kind]]]
    return [samples[i] for i in sorted(chosen)]


def score(prediction: str, answer: str) -> bool:
    """Whether the first word of the prediction is the answer, without regard to case and punctuation."""
    return _first_word(prediction) == _first_word(answer)


def _first_word(text: str) -> str:
    found = re.findall(r"\w+", text.lower())
    return found[0] if found else ""


def read_parquet(path: Path) -> list[Sample]:
    """Samples of a stored test set: rows of an image (PNG bytes) and its questions.

    A row with ``frames`` is a video: that many frames of one height stand one below the other in its image.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("Stored test sets are read with pyarrow: pip install 'vlmcompress[eval]'") from error
    samples = []
    for row in parquet.read_table(path).to_pylist():
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        if "frames" in row:
            high = image.height // row["frames"]
            image = tuple(image.crop((0, y, image.width, y + high)) for y in range(0, image.height, high))
        for n, qa in enumerate(row["questions"]):
            samples.append(Sample(f"{row['id']}-{n}", image, qa["question"], qa["answer"], qa["kind"]))
    return samples


def _stored(name: str, split: str) -> list[Sample]:
    if split != "test":
        raise ValueError(f"{name} stores its test split only; make other scenes with vlmcompress.training.scenes")
    return read_parquet(FOLDER / name.replace("-", "_") / "test.parquet")


@register_task("scenes")
def scenes(split: str) -> list[Sample]:
    """Coloured shapes and digits at 96 × 96 pixels, see ``scenes/test.json`` for how they were made."""
    return _stored("scenes", split)


@register_task("scenes-hires")
def scenes_hires(split: str) -> list[Sample]:
    """The same things on canvases of up to 192 × 192 pixels, see ``scenes_hires/test.json``; for tiled models."""
    return _stored("scenes-hires", split)


@register_task("scenes-video")
def scenes_video(split: str) -> list[Sample]:
    """Clips of 8 frames of 64 × 64 pixels about when, where and which way, see ``scenes_video/test.json``."""
    return _stored("scenes-video", split)


@register_task("documents")
def documents(split: str) -> list[Sample]:
    """Pages of 192 × 192 pixels with text, blank paper and figures, see ``documents/test.json``; for tiled models."""
    return _stored("documents", split)


@register_task("easy-vqa")
def easy_vqa(split: str) -> list[Sample]:
    """The easy-VQA data set from its own package: 1,000 test images, 9,673 questions, 13 answers."""
    try:
        import easy_vqa as package
    except ImportError as error:
        raise ImportError("The task easy-vqa needs the package easy-vqa: pip install 'vlmcompress[eval]'") from error
    if split == "test":
        rows, paths = package.get_test_questions(), package.get_test_image_paths()
    elif split == "train":
        rows, paths = package.get_train_questions(), package.get_train_image_paths()
    else:
        raise ValueError(f"easy-vqa has the splits train and test, not {split!r}")
    images: dict[int, Image.Image] = {}
    samples = []
    for n, (question, answer, index) in enumerate(zip(*rows, strict=True)):
        if index not in images:
            with Image.open(paths[index]) as file:
                images[index] = file.convert("RGB")
        samples.append(Sample(f"{split}-{index}-{n}", images[index], question, answer, _easy_vqa_kind(answer)))
    return samples


def _easy_vqa_kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "existence"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"
