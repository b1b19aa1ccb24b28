# SPDX-License-Identifier: Apache-2.0
"""The model in assets/: what it is, what it answers, and that position numbers do not carry its sight."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

pytest.importorskip("pyarrow")

from vlmcompress.eval.tasks import load
from vlmcompress.training.evaluate import accuracy, answers

FOLDER = Path(__file__).parents[2] / "assets" / "models" / "tiny-llava"


@pytest.fixture(scope="module")
def shipped():
    if not FOLDER.exists():
        pytest.skip("the model folder is part of the repository, not of the installed package")
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


def test_it_is_a_stock_llava_of_less_than_15_mb(shipped):
    model, _ = shipped
    assert type(model) is LlavaForConditionalGeneration
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15e6


def test_generate_answers_one_word_and_stops(shipped):
    model, processor = shipped
    image = Image.new("RGB", (64, 64), (250, 245, 240))
    image.paste((255, 0, 0), (20, 20, 44, 40))
    inputs = processor(images=image, text="<image> What color is the rectangle?", return_tensors="pt")
    out = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(out, skip_special_tokens=True) == "red"
    assert out[-1] == processor.tokenizer.eos_token_id
    assert len(out) == 2


def test_padded_batch_answers_as_one_by_one(shipped):
    model, processor = shipped
    samples = load("scenes", limit=12)
    texts = [f"<image> {sample.question}" for sample in samples]
    batch = processor(images=[s.image for s in samples], text=texts, padding=True, return_tensors="pt")
    said = model.generate(**batch)[:, batch["input_ids"].shape[1]]
    assert processor.tokenizer.batch_decode(said[:, None]) == answers(model, processor, samples)


@pytest.mark.parametrize(("task", "floor"), [("scenes", 0.92), ("easy-vqa", 0.97)])
def test_accuracy_is_above_its_floor(shipped, task, floor):
    samples = load(task, limit=300)
    assert accuracy(samples, answers(*shipped, samples))["all"] >= floor


def test_the_task_needs_its_tokens_and_positions_may_be_renumbered(shipped):
    samples = load("scenes", limit=300)
    whole = accuracy(samples, answers(*shipped, samples))["all"]
    gaps = accuracy(samples, answers(*shipped, samples, keep=16))["all"]
    closed = accuracy(samples, answers(*shipped, samples, keep=16, contiguous=True))["all"]
    assert whole - gaps >= 0.15
    assert abs(gaps - closed) <= 0.06


def test_keeping_every_token_changes_nothing(shipped):
    model, processor = shipped
    samples = load("scenes", limit=20)
    assert answers(model, processor, samples, keep=144) == answers(model, processor, samples)


def test_no_state_is_left_in_training_mode(shipped):
    assert not shipped[0].training
    assert all(p.dtype == torch.float32 for p in shipped[0].parameters())
