# SPDX-License-Identifier: Apache-2.0
"""``resize`` on a model of native resolution: the row answers what the model answers about smaller pictures."""

import pytest
import torch
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("easy_vqa")
pytest.importorskip("torchvision")

from vlmcompress.eval.downscale import downscaled, downscales
from vlmcompress.eval.loading import answer, encode_chats, turn
from vlmcompress.eval.rows import Row
from vlmcompress.eval.runner import run_rows, time_rows
from vlmcompress.eval.store import Store
from vlmcompress.eval.tasks import Sample
from vlmcompress.training.processor import build_processor
from vlmcompress.training.scenes import make_scene
from vlmcompress.training.tiny_llava import Recipe, build_llava
from vlmcompress.training.tiny_qwen import QwenRecipe, build_qwen
from vlmcompress.training.tiny_qwen_data import qwen_processor
from vlmcompress.training.tower import TowerConfig, TowerWithHeads
from vlmcompress.training.video_scenes import make_clip


@pytest.fixture(scope="module")
def qwen():
    plain, processor = build_processor(), qwen_processor()
    recipe = Recipe(tower=TowerConfig(hidden_size=32, layers=2, heads=2), hidden_size=40, layers=2, heads=2)
    torch.manual_seed(0)
    base = build_llava(recipe, plain, TowerWithHeads(recipe.tower, plain.tokenizer))
    small = QwenRecipe(width=32, layers=2, heads=2, full_attention=(1,))
    return build_qwen(small, base, processor.tokenizer).eval(), processor


def tokens(model, processor, chat) -> int:
    ids = encode_chats(model, processor, [chat])["input_ids"]
    return int(((ids == model.config.image_token_id) | (ids == model.config.video_token_id)).sum())


SCENE = make_scene(1, 1).image
WIDE = Image.new("RGB", (128, 64), "red")
FRAMES = list(make_clip(1, 1).frames)


@pytest.mark.parametrize(
    ("media", "keep", "left"),
    [(SCENE, 48, 42), (SCENE, 0.25, 36), (SCENE, 200, 144), (WIDE, 32, 32), (FRAMES, 64, 64), (FRAMES, 0.5, 4 * 30)],
)
def test_pictures_and_frames_make_as_many_tokens_as_fit(qwen, media, keep, left):
    chat = turn("is there a star", media)
    small = downscaled(qwen[1], chat, keep)
    assert tokens(*qwen, small) == left
    assert small[0]["content"][-1] == chat[0]["content"][-1]
    assert chat[0]["content"][0] == turn("", media)[0]["content"][0]  # the caller's chat is as it was


def test_row_answers_as_the_model_on_smaller_pictures(qwen, tmp_path):
    model, processor = qwen
    samples = [Sample(str(i), make_scene(1, i).image, "is there a star", "yes", "existence") for i in range(3)]
    rows = [Row("none"), Row("resize", 36), Row("grid", 36)]
    store = Store(tmp_path / "store", {})
    assert run_rows(model, processor, rows, {"t": samples}, store, batch_size=2, max_new_tokens=3) == {}
    resized, grid = store.answers(rows[1].key), store.answers(rows[2].key)
    chats = [downscaled(processor, sample.chat(), 36) for sample in samples]
    wanted = [answer(model, processor, encode_chats(model, processor, [chat]), 3)[0] for chat in chats]
    assert [line["prediction"] for line in resized] == wanted
    assert {line["tokens_in"] for line in resized} == {line["tokens_in"] for line in grid} == {36}
    assert resized[0]["full"] < grid[0]["full"]  # the tower is spared too


def test_clock_runs_on_the_smaller_picture(qwen, monkeypatch):
    model, processor = qwen
    seen = []
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    sample = Sample("0", SCENE, "is there a star", "yes", "existence")
    timings, errors = time_rows(model, processor, [Row("resize", 36)], sample, rounds=1, decode_tokens=1)
    assert errors == {}
    assert set(timings) == {"resize-keep36"}
    assert set(seen) == {4 * 36}


def test_other_rows_and_families_are_left_alone(qwen):
    assert downscales(qwen[1], Row("resize", 36))
    assert not downscales(qwen[1], Row("grid", 36))
    assert not downscales(build_processor(), Row("resize", 36))


@pytest.mark.parametrize(
    ("media", "keep", "said"),
    [(SCENE, 3, "at least 4 tokens"), (FRAMES, 3, "4 frames in 3 tokens"), ("file.png", 36, "addresses")],
)
def test_refusals(qwen, media, keep, said):
    chat = [{"role": "user", "content": [{"type": "image" if media is not FRAMES else "video",
                                          "image" if media is not FRAMES else "video": media}]}]  # fmt: skip
    with pytest.raises(ValueError, match=said):
        downscaled(qwen[1], chat, keep)
