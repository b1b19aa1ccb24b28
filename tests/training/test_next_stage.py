# SPDX-License-Identifier: Apache-2.0
"""tiny-llava-next's recipe at a very small size: a loadable model, resumed runs, and the command."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("easy_vqa")
pytest.importorskip("accelerate")
pytest.importorskip("torchvision")

from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration
from typer.testing import CliRunner

from vlmcompress.eval.tasks import Sample
from vlmcompress.training import tiny_llava_next
from vlmcompress.training.cli import app
from vlmcompress.training.evaluate import answers
from vlmcompress.training.hires import TiledDataset
from vlmcompress.training.processor import build_processor
from vlmcompress.training.tiny_llava import Recipe, build_llava
from vlmcompress.training.tiny_llava_next import NextRecipe, train_tiny_llava_next
from vlmcompress.training.tower import TowerConfig, TowerWithHeads

SMALL = NextRecipe(
    steps=3, small_steps=1, batch=2, questions=3, validation_images=3, measure_every=2, save_every=2, easy_vqa=False
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    recipe = Recipe(tower=TowerConfig(hidden_size=32, layers=2, heads=2), hidden_size=32, layers=2, heads=2)
    folder, processor = tmp_path_factory.mktemp("base"), build_processor()
    torch.manual_seed(0)
    build_llava(recipe, processor, TowerWithHeads(recipe.tower, processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train_tiny_llava_next(SMALL, base, folder / "model", folder / "work")


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def test_recipe_makes_a_loadable_model_and_leaves_the_tower_alone(base, whole):
    model = AutoModelForImageTextToText.from_pretrained(whole)
    assert type(model) is LlavaNextForConditionalGeneration
    assert AutoProcessor.from_pretrained(whole).image_token_id == model.config.image_token_id
    before, after = weights(base), weights(whole)
    assert set(after) - set(before) == {"model.image_newline"}
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed
    assert not any("vision_tower" in name for name in changed)
    assert (whole / "training.png").stat().st_size > 1000
    work = whole.parent / "work" / "answers"
    assert (work / "measures.jsonl").read_text().count("\n") == 2
    assert json.loads((work / "log.json").read_text())[-1]["step"] == 3


def test_a_resumed_run_equals_an_unbroken_one(base, whole, tmp_path):
    train_tiny_llava_next(SMALL, base, tmp_path / "model", tmp_path / "work")
    (tmp_path / "work" / "answers" / "checkpoint-3").rename(tmp_path / "lost")  # as if cut off after step 2
    resumed = weights(train_tiny_llava_next(SMALL, base, tmp_path / "again", tmp_path / "work"))
    for name, value in weights(whole).items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_thumbnail_and_crops_can_be_asked_alone(whole):
    model, processor = AutoModelForImageTextToText.from_pretrained(whole).eval(), AutoProcessor.from_pretrained(whole)
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"])

    dataset = TiledDataset(9, 1, processor, 1, plain=False)
    image, (qa,) = dataset.sample(0)
    model.model.language_model.register_forward_pre_hook(record, with_kwargs=True)
    for part in (None, "thumbnail", "crops"):
        answers(model, processor, [Sample("0", image, qa.question, qa.answer, qa.kind)], keep=part)
    everything, thumbnail, crops = (embeds[0] for embeds in seen)
    end = 1 + dataset[0]["image_tokens"]
    assert torch.equal(thumbnail, torch.cat([everything[:145], everything[end:]]))
    assert torch.equal(crops, torch.cat([everything[:1], everything[145:]]))


def test_command_trains_a_share_of_the_steps(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_llava_next, "NextRecipe", lambda **given: replace(SMALL, **given))
    out = tmp_path / "model"
    result = CliRunner().invoke(app, ["tiny-llava-next", "--base", str(base), "--output", str(out), "--share", "0.5"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "model-work" / "answers" / "log.json").read_text())[-1]["step"] == 2
    assert type(AutoModelForImageTextToText.from_pretrained(out)) is LlavaNextForConditionalGeneration


@pytest.mark.parametrize("wrong", [{"--base": "nothing"}, {"--share": "2"}])
def test_command_refuses(base, tmp_path, wrong):
    options = {"--base": str(base), "--output": str(tmp_path / "m"), "--share": "1", **wrong}
    result = CliRunner().invoke(app, ["tiny-llava-next", *(word for pair in options.items() for word in pair)])
    assert result.exit_code == 2
    assert next(iter(wrong)).strip("-") in result.output
    assert not (tmp_path / "m").exists()
