# SPDX-License-Identifier: Apache-2.0
"""tiny-qwen2.5-vl in assets/: what it is, and what it answers about pictures of any size and about clips."""

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

pytest.importorskip("pyarrow")
pytest.importorskip("torchvision")

from vlmcompress.cli import main
from vlmcompress.eval.loading import encode_chats, turn
from vlmcompress.eval.tasks import Sample, load
from vlmcompress.training.evaluate import accuracy, answers

ASSETS = Path(__file__).parents[2] / "assets"
FOLDER = ASSETS / "models" / "tiny-qwen2.5-vl"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="part of the repository, not of the installed package")


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


def test_it_is_a_stock_qwen_of_less_than_15_mb(shipped):
    model, processor = shipped
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert not model.training
    assert processor.image_token_id == model.config.image_token_id
    assert processor.video_token_id == model.config.video_token_id
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15e6


@pytest.mark.parametrize(("size", "tokens"), [((96, 96), 144), ((64, 64), 64), ((96, 48), 72), ((8, 8), 4)])
def test_tokens_of_an_image(shipped, size, tokens):
    given = encode_chats(*shipped, [turn("is there a star", Image.new("RGB", size))])
    assert (given["input_ids"] == shipped[0].config.image_token_id).sum() == tokens


def test_padded_batch_of_several_sizes_and_a_clip_answers_as_one_by_one(shipped):
    model, processor = shipped
    scenes, clips = load("scenes", limit=12), load("scenes-video", limit=4)
    small = [Sample(s.id, s.image.resize((72, 64)), s.question, s.answer, s.kind) for s in scenes[:4]]
    some = [*scenes[4:8], *small, *clips]
    batch = encode_chats(model, processor, [sample.chat() for sample in some])
    out = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    alone = [answers(model, processor, [sample])[0] for sample in some]
    assert processor.tokenizer.batch_decode(out[:, :1]) == alone
    assert (out[:, 1] == processor.tokenizer.eos_token_id).all()


@pytest.mark.parametrize(("task", "floor"), [("scenes", 0.9), ("easy-vqa", 0.95)])
def test_accuracy_is_above_its_floor(shipped, task, floor):
    samples = load(task, limit=200)
    assert accuracy(samples, answers(*shipped, samples))["all"] >= floor


def test_clips_need_their_frames(shipped):
    samples = load("scenes-video", limit=200)
    still = [Sample(s.id, (s.image[0],) * len(s.image), s.question, s.answer, s.kind) for s in samples]
    whole, frozen = (accuracy(given, answers(*shipped, given)) for given in (samples, still))
    assert whole["way"] - frozen["way"] >= 0.4
    assert whole["all"] - frozen["all"] >= 0.06


def test_the_command_compresses_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    words = [FOLDER, ASSETS / "images" / "scene-1.png", "what color is the star ?"]
    drawn = tmp_path / "kept.png"
    with pytest.raises(SystemExit) as stop:
        main(["run", *map(str, words), "--method", "vtc-cls", "--keep", "32", "--out", str(drawn)])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "visual tokens in" in printed.out
    assert drawn.exists()
