# SPDX-License-Identifier: Apache-2.0
"""Tokenizer, processor and collators."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("easy_vqa")

from vlmcompress.training.data import (
    IGNORED,
    QuestionCollator,
    QuestionDataset,
    augmented_positions,
    normalize,
    pair_mask,
    to_pixels,
)
from vlmcompress.training.processor import build_processor
from vlmcompress.training.scenes import SceneConfig, make_scene


@pytest.fixture(scope="module")
def processor():
    return build_processor()


def test_template_and_plain_prompt_give_the_same_ids(processor):
    content = [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = make_scene(0, 0).image
    by_template = processor(images=image, text=prompt, return_tensors="pt")["input_ids"]
    plain = processor(images=image, text="<image> what color is the star", return_tensors="pt")["input_ids"]
    assert torch.equal(by_template, plain)
    assert (plain == processor.image_token_id).sum() == 144
    at_once = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image", "image": image}, content[1]]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(at_once["input_ids"], plain)


def test_any_text_is_read(processor):
    ids = processor.tokenizer("Zebra, über\nthe STAR?!")["input_ids"]
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<s>", "<unk>", "<unk>", "the", "star"]
    assert processor.tokenizer.decode(ids[-2:]) == "the star"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(processor, side):
    batch = processor.tokenizer(["a", "is there a star"], padding=True, padding_side=side, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 5)
    assert batch["attention_mask"][0].tolist() == ([0, 0, 0, 1, 1] if side == "left" else [1, 1, 0, 0, 0])


@pytest.mark.parametrize(("mode", "size"), [("RGB", (96, 96)), ("RGBA", (300, 100)), ("L", (20, 50)), ("P", (97, 33))])
def test_any_image_is_read(processor, mode, size):
    out = processor(images=Image.new(mode, size), text="<image> is there a star", return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 96, 96)


def test_training_pixels_are_the_processors(processor):
    image = make_scene(1, 1).image
    seen = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(normalize(to_pixels(image)), seen, atol=1e-5, rtol=0)


def test_collator_labels_answers_and_separates_pairs(processor):
    dataset = QuestionDataset(0, 4, SceneConfig(), questions=6)
    items = [dataset[i] for i in range(4)]
    collator = QuestionCollator(processor.tokenizer, 144, augment=0.0)
    batch = collator(items)
    for row, item in enumerate(items):
        labels = batch["labels"][row]
        places = ((labels != IGNORED) & (labels != collator.end_id)).nonzero().flatten().tolist()
        said = [processor.tokenizer.decode(labels[p : p + 1]) for p in places]
        assert said == [qa.answer for qa in item["qas"]]
        assert (labels == collator.end_id).sum() == 1
        # the pair's own prompt, made by the processor, has the same ids and positions
        second = item["qas"][1]
        alone = processor.tokenizer("<image>" * 144 + " " + second.question)["input_ids"]
        start = places[1] - len(processor.tokenizer(second.question, add_special_tokens=False)["input_ids"])
        assert batch["input_ids"][row, start : places[1]].tolist() == alone[145:]
        assert batch["position_ids"][row, start].item() == 145
        mask = batch["attention_mask"][row, 0]
        assert mask[places[1], :145].all()
        assert not mask[places[1], 145:start].any()
        assert not torch.triu(mask, 1).any()


def test_padding_rows_see_something():
    mask = pair_mask(torch.tensor([[0, 0, 1, 1, -1, -1]]))
    assert mask.any(-1).all()


def test_augmented_positions_are_in_order_and_end_before_the_text():
    spans = set()
    for i in range(200):
        places, start = augmented_positions(np.random.default_rng(i), 144)
        assert places.shape == (145,)
        assert places[0] == 0
        assert (np.diff(places) >= 0).all()
        assert start > places[-1]
        spans.add(int(places[-1]))
    assert min(spans) < 20
    assert max(spans) > 200
