# SPDX-License-Identifier: Apache-2.0
"""tiny-llava-next in assets/: what it is, what it answers, and that it needs its crops."""

from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

pytest.importorskip("pyarrow")
pytest.importorskip("torchvision")

from vlmcompress.cli import main
from vlmcompress.eval.tasks import load
from vlmcompress.training.evaluate import accuracy, answers

ASSETS = Path(__file__).parents[2] / "assets"
FOLDER = ASSETS / "models" / "tiny-llava-next"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="part of the repository, not of the installed package")


@pytest.fixture(scope="module")
def shipped():
    return AutoModelForImageTextToText.from_pretrained(FOLDER).eval(), AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def hires():
    return load("scenes-hires", limit=120)


@pytest.fixture(scope="module")
def whole(shipped, hires):
    return accuracy(hires, answers(*shipped, hires))


def test_it_is_a_stock_llava_next_of_less_than_15_mb(shipped):
    model, _ = shipped
    assert type(model) is LlavaNextForConditionalGeneration
    assert not model.training
    assert model.config.image_grid_pinpoints == [[96, 192], [192, 96], [192, 192]]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15e6


@pytest.mark.parametrize(("size", "tokens"), [((192, 192), 744), ((192, 96), 444), ((96, 192), 456), ((192, 144), 594)])
def test_tokens_of_an_image(shipped, size, tokens):
    model, processor = shipped
    given = processor(images=Image.new("RGB", size), text="<image> is there a star", return_tensors="pt")
    assert (given["input_ids"] == model.config.image_token_id).sum() == tokens


def test_padded_batch_of_several_sizes_answers_as_one_by_one(shipped, hires):
    model, processor = shipped
    some = list({sample.image.size: sample for sample in hires}.values())
    assert len(some) > 3
    texts = [f"<image> {sample.question}" for sample in some]
    batch = processor(images=[s.image for s in some], text=texts, padding=True, return_tensors="pt")
    out = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    assert processor.tokenizer.batch_decode(out[:, :1]) == answers(model, processor, some)
    assert (out[:, 1] == processor.tokenizer.eos_token_id).all()


def test_accuracy_is_above_its_floor(whole):
    assert whole["all"] >= 0.85
    assert whole["digit"] >= 0.95


def test_the_thumbnail_alone_does_not_do(shipped, hires, whole):
    thumbnail = accuracy(hires, answers(*shipped, hires, keep="thumbnail"))
    assert whole["all"] - thumbnail["all"] >= 0.2
    assert thumbnail["digit"] <= 0.3


@pytest.mark.parametrize(("task", "floor"), [("scenes", 0.86), ("easy-vqa", 0.95)])
def test_other_tasks_are_above_their_floor(shipped, task, floor):
    samples = load(task, limit=100)
    assert accuracy(samples, answers(*shipped, samples))["all"] >= floor


def test_the_command_compresses_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    words = [FOLDER, ASSETS / "images" / "hires-1.png", "what digit stands alone ?"]
    drawn = tmp_path / "kept.png"
    with pytest.raises(SystemExit) as stop:
        main(["run", *map(str, words), "--method", "globalcom2", "--keep", "0.5", "--out", str(drawn)])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    assert "visual tokens in" in printed.out
    assert drawn.exists()
