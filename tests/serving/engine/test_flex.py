# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX in a real engine: the projector comes from the checkpoint, the number of tokens from the settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving.engine import folders
from serving.engine.asking import answers, by_engine, by_transformers, questions
from serving.engine.conftest import ASSETS, TINY
from serving.engine.test_families import requests_of
from serving.engine.widened import widen
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmcompress
from vlmcompress import flex

PLACEHOLDER = 4


def flexible(family: str, base: Path) -> Path:
    """A model folder of ``family`` with a TokenFLEX projector; random, and large enough that answers differ."""
    made = {"llava": TINY, "llava_next": ASSETS / "models" / "tiny-llava-next"}.get(family) or folders.internvl(
        base / "stock"
    )
    model, processor = AutoModelForImageTextToText.from_pretrained(made), AutoProcessor.from_pretrained(made)
    torch.manual_seed(0)
    projector = flex.install(model, counts=(4, 9))
    torch.nn.init.normal_(projector.mlp.down.weight, std=0.5)
    target = base / "flexible"
    model.save_pretrained(target)
    processor.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """The folder, its model in transformers and its processor."""
    folder = flexible("llava", tmp_path_factory.mktemp("models"))
    return folder, flex.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("keep", [9, 16])  # a count of the checkpoint's, and another
def test_llava(start, llava, tmp_path, keep):
    folder, model, processor = llava
    llm = start(widen(folder, tmp_path / "wide"), {"method": "tokenflex", "keep": keep})
    requests = questions(processor, 20)
    outputs = by_engine(llm, requests)
    assert {output.prompt_token_ids.count(PLACEHOLDER) for output in outputs} == {keep}
    with flex.use(model, keep):
        assert answers(outputs) == by_transformers(model, processor, requests)
    # the same as a prompt that was written for that count
    flex.set_tokens(native := AutoProcessor.from_pretrained(folder), keep)
    assert answers(outputs) == by_transformers(model, native, requests)
    assert len(set(map(tuple, answers(outputs)))) > 1


@pytest.mark.parametrize(
    ("family", "options"), [("llava_next", {"keep": 9, "per_view": True}), ("internvl", {"keep": 16})]
)
def test_tiles(start, tmp_path, family, options):
    folder = flexible(family, tmp_path)
    served = widen(folder, tmp_path / "wide") if family == "llava_next" else folder
    llm = start(served, {"method": "tokenflex", **options}, max_model_len=2048, max_num_batched_tokens=2048)
    model, processor = flex.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    requests = requests_of(family, several=False)
    outputs = by_engine(llm, requests)
    if family == "internvl":
        processor.image_seq_length = 64  # the stock prompt for a model without pixel shuffle
    with vlmcompress.compress(model, "tokenflex", positions="contiguous", **options) as handle:
        expected = by_transformers(model, processor, requests[:5])
        kept = len(handle.last.samples[0].images[0].kept)
    assert answers(outputs)[:5] == expected
    assert len(set(map(tuple, expected))) > 1
    assert outputs[4].prompt_token_ids.count(model.config.image_token_id) == kept


def test_without_settings_a_flexible_checkpoint_is_refused(start, llava, tmp_path):
    with pytest.raises(ValueError, match=r'has a TokenFLEX projector.*"method": "tokenflex", "keep": 9'):
        start(widen(llava[0], tmp_path / "wide"))
