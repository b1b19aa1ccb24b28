# SPDX-License-Identifier: Apache-2.0
"""Videos of InternVL and SmolVLM, whose frames come as images do: prompts of the real processors, and what is no video."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models_tiles import END, FAMILIES, FRAME, IMAGE, NEWLINE, SPACE, START, ZERO, internvl, prompts, smolvlm
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

import vlmcompress
from vlmcompress.adapters.labels import numbered_frames

SPECIAL = ["<image>", "<fake_token_around_image>", "<global-img>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
WORDS = ["<pad>", "<unk>", "\n", "\n\n", " ", ":", "-", "Frame", "from", "Image", *"0123456789", *SPECIAL]


def tokenizer() -> PreTrainedTokenizerFast:
    """Digits one by one, words, marks and blanks apart, as the tokenizers of both families do it."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|\n+| |[^\s\p{L}\p{N}]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", padding_side="left",
        extra_special_tokens={
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>", "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
    )  # fmt: skip


def clips(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8) for n in lengths]


def found(model, inputs, token: str) -> list[list[tuple[str, int, int]]]:
    """Per row: kind, tokens and kept tokens of everything shown, the same in a forward pass and in generation."""
    model.config.image_token_id = WORDS.index(token)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad(), vlmcompress.compress(model, "vtc-cls", keep=10) as handle:
        model(**inputs)
        seen = [[(i.kind, i.n_original, len(i.kept)) for i in sample.images] for sample in handle.last.samples]
        model.generate(**inputs, max_new_tokens=2, num_beams=2, suppress_tokens=[WORDS.index(token)])
        again = [[(i.kind, i.n_original, len(i.kept)) for i in sample.images] for sample in handle.last.samples]
    assert again[::2] == seen
    return seen


def test_internvl():
    """Numbers of one and of two digits, two videos of a prompt, a picture beside one."""
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=False),
        tokenizer=tokenizer(), image_seq_length=16,
        video_processor=InternVLVideoProcessor(size={"height": 32, "width": 32}, do_sample_frames=False),
    )  # fmt: skip
    picture = clips(1)[0][0]
    texts = ["<video>\nwhat", "what <video>\n<video>"]
    inputs = [
        processor(text=[texts[0]], videos=clips(12), return_tensors="pt"),
        processor(text=[texts[1]], videos=clips(3, 3), return_tensors="pt"),
        processor(text=["<IMG_CONTEXT>\n<video>"], images=[picture], videos=clips(4), return_tensors="pt"),
    ]
    model = internvl()
    assert [found(model, given, "<IMG_CONTEXT>") for given in inputs] == [
        [[("video", 12 * 16, 10)]],
        [[("video", 48, 10), ("video", 48, 10)]],
        [[("image", 16, 10), ("video", 64, 10)]],
    ]


def test_smolvlm():
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32}),
        tokenizer=tokenizer(), image_seq_len=16,
        video_processor=SmolVLMVideoProcessor(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_sample_frames=False
        ),
    )  # fmt: skip
    meta = [{"fps": 1, "total_num_frames": 4, "duration": 4, "frames_indices": [0, 1, 2, 3]}] * 2
    inputs = processor(
        text=["<video> what", "is <video>"], videos=[[clip] for clip in clips(4, 4)], video_metadata=[[m] for m in meta],
        padding=True, return_tensors="pt",
    )  # fmt: skip
    assert found(smolvlm(), inputs, "<image>") == [[("video", 64, 10)], [("video", 64, 10)]]


DASH = 70


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[FRAME, ZERO + 1, SPACE], [FRAME, ZERO + 2, SPACE], [FRAME, ZERO + 1, ZERO, SPACE]], [3]),
        ([[FRAME, ZERO + 1, SPACE], [FRAME, ZERO + 2, SPACE], [FRAME, ZERO + 1, SPACE]], [2, 1]),
        ([[FRAME, DASH, ZERO + 1, SPACE], [FRAME, DASH, ZERO + 2, SPACE]], [1, 1]),  # Image-1:, Image-2:
        ([[FRAME, ZERO + 1, SPACE], [FRAME, ZERO + 1, SPACE]], [1, 1]),
        ([[9, ZERO + 1, SPACE], [FRAME, ZERO + 2, SPACE]], [1, 1]),
        ([[], []], [1, 1]),
        ([[FRAME, ZERO + 1, SPACE]], [1]),
    ],
)  # fmt: skip
def test_only_numbered_runs_are_frames(labels, expected):
    ids, spans = [], []
    for label in labels:
        ids += [*([NEWLINE] if ids else []), *label, START]
        spans.append((len(ids), 4))
        ids += [IMAGE] * 4 + [END]
    assert numbered_frames(ids, spans, 4) == expected
    if len(spans) > 1:  # tiles are no frames
        assert numbered_frames(ids, spans, 2) == [1] * len(spans)


@pytest.mark.parametrize("family", ["internvl", "smolvlm"])
@torch.no_grad()
def test_videos_beside_tiles_are_refused(family):
    model = FAMILIES[family].build()
    inputs = prompts(FAMILIES[family], model, [[4, (1, 2), 3], [2, ("video", 2), 5]])
    with (
        vlmcompress.compress(model, "grid", keep=4),
        pytest.raises(ValueError, match="in calls of their own"),
    ):
        model(**inputs)
