# SPDX-License-Identifier: Apache-2.0
"""tiny-flex in assets/: one set of weights that answers at any number of visual tokens."""

from pathlib import Path

import pytest
from transformers import AutoProcessor, LlavaForConditionalGeneration

pytest.importorskip("pyarrow")
pytest.importorskip("torchvision")

import vlmcompress
from vlmcompress.eval.loading import answer, encode, load
from vlmcompress.eval.tasks import load as load_task
from vlmcompress.methods.tokenflex_adaptive import calibrate_adaptive

FOLDER = Path(__file__).parents[2] / "assets" / "models" / "tiny-flex"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="part of the repository, not of the installed package")


@pytest.fixture(scope="module")
def shipped():
    return load(str(FOLDER))


def test_it_is_a_stock_llava_of_less_than_15_mb(shipped):
    model, processor = shipped
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is type(AutoProcessor.from_pretrained(FOLDER))
    assert model.config.tokenflex["counts"] == [9, 36, 144]
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 15e6


@pytest.mark.parametrize(("tokens", "floor"), [(144, 0.9), (36, 0.9), (16, 0.87), (9, 0.84)])
def test_accuracy_is_above_its_floor_at_every_count(shipped, tokens, floor):
    model, processor = shipped
    asked = load_task("scenes", limit=300)
    inputs = encode(model, processor, [s.image for s in asked], [s.question for s in asked])
    with vlmcompress.compress(model, "tokenflex", keep=tokens) as handle:
        said = answer(model, processor, inputs, 3)
        assert handle.last.layer_tokens[0] == tokens * len(asked)
    right = [s.mark(text)["correct"] for s, text in zip(asked, said, strict=True)]
    assert sum(right) / len(right) >= floor


def test_pictures_of_one_thing_get_fewer_tokens(shipped):
    model, processor = shipped
    crowded, plain = load_task("scenes", limit=60), load_task("easy-vqa", limit=60)
    samples = [s.image for s in (*crowded, *plain)]
    inputs = encode(model, processor, samples, ["is there a star"] * len(samples))
    method = calibrate_adaptive(model, [inputs], average=36, counts=(9, 36, 144))
    with vlmcompress.compress(model, method) as handle:
        answer(model, processor, inputs, 1)
    counts = handle.last.frames[0].counts
    assert sum(counts) / len(counts) == pytest.approx(36, rel=0.1)
    assert sum(counts[:60]) > 1.5 * sum(counts[60:])
