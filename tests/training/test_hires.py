# SPDX-License-Identifier: Apache-2.0
"""Hires scenes, their tiles, and training samples that are what the stock model is asked."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("easy_vqa")
pytest.importorskip("torchvision")

from vlmcompress.training.data import IGNORED
from vlmcompress.training.hires import HIRES, PINPOINTS, TILE, TiledCollator, TiledDataset
from vlmcompress.training.processor import build_processor, tiled_processor
from vlmcompress.training.questions import QA, ask
from vlmcompress.training.scenes import SceneConfig, make_scene, patch_labels
from vlmcompress.training.tiny_llava import Recipe, build_llava
from vlmcompress.training.tiny_llava_next import TiledAnswerModel, build_llava_next
from vlmcompress.training.tower import TowerConfig, TowerWithHeads

SMALL = Recipe(tower=TowerConfig(hidden_size=32, layers=2, heads=2), hidden_size=32, layers=2, heads=2)
BY_SIZE = {config.box: config for config in HIRES}
sizes = pytest.mark.parametrize("box", sorted(BY_SIZE))


@pytest.fixture(scope="module")
def processor():
    return tiled_processor(build_processor(), PINPOINTS)


@pytest.fixture(scope="module")
def base():
    plain = build_processor()
    torch.manual_seed(0)
    return build_llava(SMALL, plain, TowerWithHeads(SMALL.tower, plain.tokenizer)).eval()


@pytest.fixture(scope="module")
def model(base):
    return build_llava_next(base).eval()


@sizes
def test_things_lie_inside_and_no_digit_is_cut_by_a_seam(box):
    width, height = box
    digits = 0
    for i in range(40):
        scene = make_scene(1, i, BY_SIZE[box])
        assert scene.image.size == box
        for thing in scene.things:
            half = thing.size / 2
            assert half <= thing.x <= width - half
            assert half <= thing.y <= height - half
            if thing.label:
                digits += 1
                assert thing.x % 8 == thing.y % 8 == 4
                assert width <= TILE or abs(thing.x - width / 2) >= half
                assert height <= TILE or abs(thing.y - height / 2) >= half
    assert digits > 20


def test_places_are_told_by_the_side_they_lie_on():
    scene = make_scene(2, 0, SceneConfig(canvas=96, height=192, objects=(1, 1), digit_share=0.0))
    thing = scene.things[0]
    asked = {qa.question: qa.answer for qa in ask(scene, np.random.default_rng(0), 40)}
    height = asked[f"at which height is the {thing.kind}"]
    assert height == ("top" if thing.y < 96 else "bottom")
    labels = patch_labels(scene, 8)
    assert labels["kind"].shape == (24, 12)
    assert labels["kind"][int(thing.y // 8), int(thing.x // 8)] > 0


@sizes
def test_tiles_show_the_pixels_of_the_image_unscaled(box, processor):
    image = make_scene(3, 0, BY_SIZE[box]).image
    seen = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0]
    rows, cols = (-(-side // TILE) for side in reversed(box))
    assert len(seen) == 1 + rows * cols
    canvas = seen[1:].view(rows, cols, 3, TILE, TILE).permute(2, 0, 3, 1, 4).reshape(3, rows * TILE, cols * TILE)
    top, left = (rows * TILE - box[1]) // 2, (cols * TILE - box[0]) // 2
    shown = canvas[:, top : top + box[1], left : left + box[0]]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(shown, pixels, atol=1e-5, rtol=0)


def test_the_thumbnail_is_seen_as_the_base_model_sees_it(processor, base, model):
    image = make_scene(4, 0, BY_SIZE[192, 192]).image
    given = processor(images=image, text="<image>", return_tensors="pt")
    with torch.no_grad():
        tiled = model.model.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output[0]
        plain = base.model.get_image_features(given["pixel_values"][0, :1]).pooler_output[0]
    torch.testing.assert_close(tiled[:144], plain, atol=1e-5, rtol=1e-5)
    # 24 rows of 24 cells, each row followed by the newline
    newlines = tiled[144:].view(24, 25, -1)[:, 24]
    assert torch.equal(newlines, model.model.image_newline.expand_as(newlines))


def test_a_base_that_does_not_fit_is_refused(base):
    other = build_llava(SMALL, build_processor(), TowerWithHeads(SMALL.tower, build_processor().tokenizer))
    del other.model.multi_modal_projector.linear_2
    with pytest.raises(ValueError, match=r"missing.*linear_2"):
        build_llava_next(other)


def test_items_of_a_run_have_one_size_and_runs_differ(processor):
    dataset = TiledDataset(5, 80, processor, questions=4, batch=4, small_until=40)
    images = [dataset.sample(i)[0].size for i in range(80)]
    runs = [set(images[k : k + 4]) for k in range(0, 80, 4)]
    assert all(len(run) == 1 for run in runs)
    assert set.union(*runs[:10]) <= {(96, 96), (192, 96), (96, 192)}
    assert (192, 192) in set.union(*runs[10:])
    again = TiledDataset(5, 80, processor, questions=4, batch=4, small_until=40)[33]
    assert torch.equal(again["pixels"], dataset[33]["pixels"])
    assert again["qas"] == dataset[33]["qas"]


def test_easy_vqa_is_mixed_in(processor):
    odd = (Image.new("RGB", (64, 64)), [QA("is there a star", "no", "existence")])
    dataset = TiledDataset(6, 60, processor, questions=4, easy_vqa=[odd])
    assert 0 < sum(dataset.sample(i)[1] == odd[1] for i in range(60)) < 20


def test_a_training_sample_asks_what_single_prompts_ask(processor, model):
    """Loss of a batch of two sizes = mean over all its pairs of the stock loss of one image, one question, answer."""
    dataset = TiledDataset(7, 12, processor, questions=3, plain=False)
    items = sorted((dataset[i] for i in range(12)), key=lambda item: item["image_tokens"])[::11]
    assert items[0]["image_tokens"] != items[1]["image_tokens"]
    collator = TiledCollator(processor.tokenizer, augment=0.0)
    batch = collator(items)
    parts = []
    with torch.no_grad():
        loss = TiledAnswerModel(model)(**batch)["loss"]
        for item in items:
            for n, qa in enumerate(item["qas"]):
                prompt = f"<image> {qa.question} {qa.answer}" + (" </s>" if n == 0 else "")
                given = processor(images=dataset.sample(item["index"])[0], text=prompt, return_tensors="pt")
                labels = given["input_ids"].clone()
                asked = 2 if n == 0 else 1
                labels[:, :-asked] = IGNORED
                parts += [model(**given, labels=labels).loss] * asked
    torch.testing.assert_close(loss, torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)
