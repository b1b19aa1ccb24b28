# SPDX-License-Identifier: Apache-2.0
"""Three steps of each stage at a very small size, resumed runs, and the command."""

import json
from dataclasses import replace
from functools import cache

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("easy_vqa")
pytest.importorskip("accelerate")

from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

from vlmcompress.training import tiny_llava
from vlmcompress.training.cli import app
from vlmcompress.training.data import EasyVQA
from vlmcompress.training.processor import build_processor
from vlmcompress.training.tiny_llava import Recipe, build_llava, train_answers, train_tiny_llava, train_tower
from vlmcompress.training.tower import TowerConfig, TowerWithHeads

SMALL = Recipe(
    tower=TowerConfig(hidden_size=32, layers=2, heads=2), hidden_size=32, layers=2, heads=2, questions=4, last_questions=3,
    tower_steps=4, tower_batch=4, language_steps=3, easy_steps=1, last_steps=3, batch=2,
    measure_every=2, save_every=2, validation_images=4,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _easy_vqa_read_once():
    # the test split has a quarter of the images; nothing made here is kept
    read = cache(lambda split: EasyVQA("test", build_processor().image_processor))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_llava, "EasyVQA", lambda split, image_processor: read(split))
        yield


def test_recipe_makes_a_loadable_model(tmp_path):
    out = train_tiny_llava(SMALL, tmp_path / "model", tmp_path / "work")
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert processor.image_token_id == model.config.image_token_id
    assert (out / "training.png").stat().st_size > 1000
    for stage in ("tower", "language", "last"):
        log = json.loads((tmp_path / "work" / stage / "log.json").read_text())
        assert log[-1]["train_loss"] > 0
        assert (tmp_path / "work" / stage / "measures.jsonl").read_text().count("\n") == 2
    again = train_tiny_llava(SMALL, tmp_path / "again", tmp_path / "work")  # every stage is done: nothing is trained
    for a, b in zip(model.parameters(), AutoModelForImageTextToText.from_pretrained(again).parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_equals_an_unbroken_one(tmp_path):
    processor = build_processor()
    whole = train_tower(SMALL, tmp_path / "whole", processor, resume=False)
    train_tower(SMALL, tmp_path / "broken", processor, resume=False)
    (tmp_path / "broken" / "tower.pt").unlink()  # as if cut off after the checkpoint of step 2
    for path in (tmp_path / "broken").glob("checkpoint-4"):
        path.rename(tmp_path / "lost")
    resumed = train_tower(SMALL, tmp_path / "broken", processor, resume=True)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("unfreeze", [False, True])
def test_a_resumed_language_stage_equals_an_unbroken_one(tmp_path, last, unfreeze):
    processor = build_processor()

    def stage(folder, resume):
        torch.manual_seed(0)
        tower = TowerWithHeads(SMALL.tower, processor.tokenizer)
        model = build_llava(SMALL, processor, tower)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        heads = tower if unfreeze else None
        return start, train_answers(SMALL, tmp_path / folder, processor, model, heads, last, resume).state_dict()

    _, whole = stage("whole", resume=False)
    stage("broken", resume=False)
    (tmp_path / "broken" / "model").rename(tmp_path / "lost model")  # as if cut off after the checkpoint of step 2
    (tmp_path / "broken" / "checkpoint-3").rename(tmp_path / "lost")
    start, resumed = stage("broken", resume=True)
    log = json.loads((tmp_path / "broken" / "log.json").read_text())
    assert log[-1]["step"] == 3
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, msg=name)
    changed = {name for name, value in start.items() if not torch.equal(value, resumed[name])}
    assert any("language_model" in name for name in changed)
    assert any("vision_tower" in name for name in changed) == unfreeze


def test_the_caption_of_an_image_without_labels_counts_for_nothing():
    torch.manual_seed(0)
    model = TowerWithHeads(SMALL.tower, build_processor().tokenizer)
    labels = {name: torch.zeros(3, 144, dtype=torch.long) for name in ("color", "kind", "digit")}
    labels["color"][2] = labels["kind"][2] = labels["digit"][2] = -100
    pixels = torch.randn(3, 3, 96, 96)
    ids = torch.randint(5, 60, (3, 6))
    mask = torch.ones_like(ids)
    first = model(pixels, caption_ids=ids, caption_mask=mask, **labels)["loss"]
    ids[2] = 7
    assert torch.allclose(first, model(pixels, caption_ids=ids, caption_mask=mask, **labels)["loss"], atol=1e-5)


def test_command_refuses_a_wrong_share(tmp_path):
    result = CliRunner().invoke(app, ["tiny-llava", "--output", str(tmp_path / "m"), "--share", "2"])
    assert result.exit_code == 2
    assert "share" in result.output


def test_two_seeds_differ(tmp_path):
    processor = build_processor()
    a = train_tower(replace(SMALL, tower_steps=1), tmp_path / "a", processor, resume=False)
    b = train_tower(replace(SMALL, tower_steps=1, seed=1), tmp_path / "b", processor, resume=False)
    assert not torch.equal(a.clip.visual_projection.weight, b.clip.visual_projection.weight)
