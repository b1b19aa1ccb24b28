# SPDX-License-Identifier: Apache-2.0
"""Prompts as the real processors of InternVL and Idefics3 write them: which views make an image, and how its tiles lie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models_tiles import internvl, smolvlm
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
)

import vlmcompress

MARKS = [f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)]
SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *MARKS,
           "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]  # fmt: skip
WORDS = ["<pad>", "<unk>", "what", "is", "this", "\n", "\n\n", *SPECIAL]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", padding_side="left",
        additional_special_tokens=SPECIAL,
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """A tall, a wide and a square picture of coarse noise."""
    random = np.random.default_rng(0)
    shapes = (30, 10), (10, 20), (4, 4)
    blocks = [random.integers(0, 255, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return [Image.fromarray(np.kron(block, np.ones((10, 10, 1), dtype=np.uint8))) for block in blocks]


def tiles_of(model, inputs, token: str) -> list[tuple[int, int]]:
    model.config.image_token_id = WORDS.index(token)
    with torch.no_grad(), vlmcompress.compress(model, "globalcom2", keep=0.4) as handle:
        model(**inputs)
        found = handle.last.layout.tiles
        model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[WORDS.index(token)])
        assert handle.last.layout.tiles == found
        assert [len(sample.images) for sample in handle.last.samples] == [1, 2]
    return found


def test_idefics3(pictures):
    images = Idefics3ImageProcessor(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(image_processor=images, tokenizer=tokenizer(), image_seq_len=16)
    inputs = processor(
        images=[pictures[:1], pictures[1:]], text=["what <image> this", "is <image> what <image>"], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert tiles_of(smolvlm(old=True), inputs, "<image>") == [(3, 1), (2, 3), (3, 3)]


def test_internvl(pictures):
    """The pictures' own shapes, which the model is not told."""
    images = GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=6
    )  # fmt: skip
    processor = InternVLProcessor(
        image_processor=images, tokenizer=tokenizer(), video_processor=InternVLVideoProcessor(), image_seq_length=16
    )
    inputs = processor(
        images=pictures, text=["what <IMG_CONTEXT> this", "is <IMG_CONTEXT> what <IMG_CONTEXT>"], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    wanted = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    assert tiles_of(internvl(), wanted, "<IMG_CONTEXT>") == [(3, 1), (1, 2), (0, 0)]
