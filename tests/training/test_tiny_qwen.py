# SPDX-License-Identifier: Apache-2.0
"""tiny-qwen2.5-vl's recipe at a very small size: what it reads, what it starts from, resumed runs, and the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("easy_vqa")
pytest.importorskip("accelerate")
pytest.importorskip("torchvision")

from models import AHEAD
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)
from typer.testing import CliRunner

from vlmcompress.eval.loading import prompt_of, turn
from vlmcompress.training import tiny_qwen
from vlmcompress.training.cli import app
from vlmcompress.training.data import to_pixels
from vlmcompress.training.processor import build_processor, build_tokenizer
from vlmcompress.training.questions import QA
from vlmcompress.training.tiny_llava import Recipe, build_llava
from vlmcompress.training.tiny_qwen import QwenRecipe, build_qwen, train_tiny_qwen
from vlmcompress.training.tiny_qwen_data import QwenCollator, QwenDataset, qwen_processor, qwen_tokenizer
from vlmcompress.training.tower import TowerConfig, TowerWithHeads
from vlmcompress.training.video_scenes import VideoConfig, make_clip, video_vocabulary

SMALL = QwenRecipe(
    width=32, layers=2, heads=2, full_attention=(1,), copy_steps=3, copy_batch=2, answer_steps=3, easy_steps=1, batch=2,
    questions=3, validation_images=3, measure_every=2, save_every=2, easy_vqa=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    recipe = Recipe(tower=TowerConfig(hidden_size=32, layers=2, heads=2), hidden_size=40, layers=2, heads=2)
    folder, processor = tmp_path_factory.mktemp("base"), build_processor()
    torch.manual_seed(0)
    build_llava(recipe, processor, TowerWithHeads(recipe.tower, processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train_tiny_qwen(SMALL, base, folder / "model", folder / "work")


@pytest.fixture(scope="module")
def started(base):
    return build_qwen(SMALL, LlavaForConditionalGeneration.from_pretrained(base), qwen_tokenizer()).eval()


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


def shown(name: str):
    noise = np.random.default_rng(3).integers(0, 256, (96, 56, 3), dtype=np.uint8)
    return Image.fromarray(noise) if name == "picture" else list(make_clip(1, 1, VideoConfig(frames=int(name))).frames)


@pytest.mark.parametrize("name", ["picture", "4", "8"])
def test_collator_reads_what_the_stock_processor_and_model_read(started, name):
    """Pixels, grid, ids and M-RoPE positions: bit by bit, since answers are asked through the processor."""
    processor, media = qwen_processor(), shown(name)
    kind = "image" if name == "picture" else "video"
    if kind == "video" and not AHEAD:
        pytest.skip("this transformers counts the time of a video in other steps")
    text = prompt_of(processor, turn("what shape is red ?", media))
    stock = processor(text=[text], return_tensors="pt", **{f"{kind}s": [media]})
    positions, _ = started.model.get_rope_index(
        stock["input_ids"], stock["mm_token_type_ids"], stock.get("image_grid_thw"), stock.get("video_grid_thw"),
        stock.get("second_per_grid_ts"), stock["attention_mask"],
    )  # fmt: skip
    frames = torch.stack([to_pixels(frame) for frame in ([media] if kind == "image" else media)])
    item = {"frames": frames, "qas": [QA("what shape is red", "star", "shape")], "index": 0}
    ours = QwenCollator(processor.tokenizer)([item])
    length = stock["input_ids"].shape[1]
    pixels = "pixel_values" if kind == "image" else "pixel_values_videos"
    torch.testing.assert_close(ours[pixels], stock[pixels], rtol=0, atol=1e-6)
    assert torch.equal(ours[f"{kind}_grid_thw"], stock[f"{kind}_grid_thw"])
    assert torch.equal(ours["input_ids"][:, :length], stock["input_ids"])
    assert torch.equal(ours["position_ids"][..., :length], positions)
    assert ours["labels"][0, length] == processor.tokenizer.convert_tokens_to_ids("star")


def test_pairs_do_not_see_each_other(started):
    """The loss of several pairs in one sequence is that of each pair alone with the picture."""
    collator, item = QwenCollator(qwen_tokenizer()), QwenDataset(5, 1, 4, only="scenes")[0]
    together = collator([item])
    alone = [collator([{**item, "qas": [qa]}]) for qa in item["qas"]]
    with torch.no_grad():
        logits = started(**{k: v for k, v in together.items() if k != "labels"}).logits[0]
        found = iter(logits[(together["labels"][0] > 3).roll(-1)])
        for batch in alone:
            wanted = started(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
            torch.testing.assert_close(next(found), wanted[(batch["labels"][0] > 3).roll(-1)][0], rtol=1e-4, atol=1e-4)


def test_tokens_of_tiny_llava_keep_their_ids():
    old, new = build_tokenizer().get_vocab(), qwen_tokenizer().get_vocab()
    assert len(old) == len(new) == 128
    assert new["<|image_pad|>"] == old["<image>"]
    moved = {word for word, place in old.items() if new.get(word) != place}
    assert all(word == "<image>" or word.startswith("<unused") for word in moved)
    assert set(video_vocabulary()) <= set(new)


def test_language_model_starts_as_tiny_llava_s(base, started):
    llava = LlavaForConditionalGeneration.from_pretrained(base)
    llava.config.text_config.rope_parameters["rope_theta"] = SMALL.rope_theta  # the one thing that differs
    llava.model.language_model.rotary_emb = type(llava.model.language_model.rotary_emb)(llava.config.text_config)
    llava.eval()
    ids = torch.randint(5, 70, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(started(input_ids=ids).logits, llava(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_tower_starts_with_near_patches_in_sight(started):
    visual = started.model.visual
    head, heads = 16, 2
    bias = visual.blocks[0].attn.qkv.bias.view(3, heads, head)
    angle = torch.arange(8)[:, None] * visual.rotary_pos_emb.inv_freq
    near = (bias[0, :, :4] ** 2 @ angle.cos().T) + (bias[0, :, 4:8] ** 2).sum(1, keepdim=True)
    assert (near[:, 0] > near[:, 1]).all()
    assert (near[:, 1] > near[:, 3]).all()


def test_runs_of_a_batch_are_of_one_size_and_sorts_are_mixed():
    dataset = QwenDataset(7, 240, 2, batch=4, easy_until=40)
    sizes = [{tuple(dataset[i]["frames"].shape) for i in range(s, s + 4)} for s in range(0, 240, 4)]
    assert all(len(found) == 1 for found in sizes)
    kinds = {size for found in sizes for size in found}
    assert (1, 3, 96, 96) in kinds
    assert (8, 3, 64, 64) in kinds
    assert len(kinds) >= 4


def test_recipe_makes_a_loadable_model(whole):
    model = AutoModelForImageTextToText.from_pretrained(whole)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert AutoProcessor.from_pretrained(whole).image_token_id == model.config.image_token_id
    assert (whole / "training.png").stat().st_size > 1000
    for stage in ("copy", "answers"):
        work = whole.parent / "work" / stage
        assert (work / "measures.jsonl").read_text().count("\n") == 2
        assert json.loads((work / "log.json").read_text())[-1]["step"] == 3
    assert {"explained"} < set(json.loads((whole.parent / "work/copy/measures.jsonl").read_text().splitlines()[0]))


@pytest.mark.parametrize("stage", ["copy", "answers"])
def test_a_resumed_run_equals_an_unbroken_one(base, whole, tmp_path, stage):
    work = tmp_path / "work"
    train_tiny_qwen(SMALL, base, tmp_path / "model", work)
    (work / stage / "checkpoint-3").rename(tmp_path / "lost")  # as if cut off after step 2 of the stage
    if stage == "copy":
        (work / "copy" / "tower.pt").unlink()
        (work / "answers").rename(tmp_path / "later")
    resumed = weights(train_tiny_qwen(SMALL, base, tmp_path / "again", work))
    for name, value in weights(whole).items():
        torch.testing.assert_close(resumed[name], value, msg=name)


def test_copying_learns(base, tmp_path):
    """A few steps at a high rate explain more of the wanted features than none."""
    recipe = replace(SMALL, copy_steps=30, copy_rate=3e-3, measure_every=15, save_every=100)
    llava = LlavaForConditionalGeneration.from_pretrained(base).eval()
    model = build_qwen(recipe, llava, qwen_tokenizer())
    tiny_qwen.train_copy(recipe, tmp_path, model, llava, None, resume=False)
    log = [row["loss"] for row in json.loads((tmp_path / "log.json").read_text()) if "loss" in row]
    first, last = (json.loads(line)["explained"] for line in (tmp_path / "measures.jsonl").read_text().splitlines())
    assert log
    assert last > first


def test_a_base_that_does_not_fit_is_refused(base):
    llava = LlavaForConditionalGeneration.from_pretrained(base)
    del llava.model.language_model.layers[1]
    with pytest.raises(ValueError, match="does not fit"):
        build_qwen(SMALL, llava, qwen_tokenizer())


def test_command_trains_a_share_of_the_steps(base, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_qwen, "QwenRecipe", lambda **given: replace(SMALL, **given))
    out = tmp_path / "model"
    result = CliRunner().invoke(app, ["tiny-qwen2.5-vl", "--base", str(base), "--output", str(out), "--share", "0.5"])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "model-work" / "answers" / "log.json").read_text())[-1]["step"] == 2
    assert type(AutoModelForImageTextToText.from_pretrained(out)) is Qwen2_5_VLForConditionalGeneration


@pytest.mark.parametrize("wrong", [{"--base": "nothing"}, {"--share": "2"}])
def test_command_refuses(base, tmp_path, wrong):
    options = {"--base": str(base), "--output": str(tmp_path / "m"), "--share": "1", **wrong}
    result = CliRunner().invoke(app, ["tiny-qwen2.5-vl", *(word for pair in options.items() for word in pair)])
    assert result.exit_code == 2
    assert next(iter(wrong)).strip("-") in result.output
    assert not (tmp_path / "m").exists()
