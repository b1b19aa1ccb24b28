# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX models saved and loaded by stock classes, with the traps on that way."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from flex_models import N, fresh, native
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import vlmcompress
from vlmcompress import flex
from vlmcompress.projectors.tokenflex import TokenFlexProjector


@pytest.fixture(scope="module")
def model():
    return fresh()


@torch.no_grad()
def test_saves_and_loads(model, tmp_path, caplog):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    entry = json.loads((tmp_path / "config.json").read_text())["tokenflex"]
    assert (
        entry["counts"] == [4, 9, 36] and entry["probabilities"] == [0.2, 0.3, 0.5] and entry["num_image_tokens"] == 36
    )
    with caplog.at_level(logging.WARNING):
        again = flex.from_pretrained(tmp_path).eval()
    assert "MISSING" not in caplog.text
    assert type(again) is LlavaForConditionalGeneration
    for tokens in (4, 25):
        assert again(**native(tokens)).logits.equal(model(**native(tokens)).logits)
    half = flex.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_compressed_choice_is_restored(model, tmp_path):
    with flex.use(model, 9):
        wanted = model(**native(N)).logits
        model.save_pretrained(tmp_path)
    again = flex.from_pretrained(tmp_path).eval()
    with vlmcompress.restore(again) as handle:
        assert again(**native(N)).logits.equal(wanted)
        assert handle.last.layer_tokens[0] == 27


def test_stock_class_draws_a_random_projector_and_is_refused(model, tmp_path):
    """Trap 5 of the specification: no exception comes from transformers."""
    model.save_pretrained(tmp_path)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert not isinstance(stock.model.multi_modal_projector, TokenFlexProjector)
    for call in (lambda: vlmcompress.compress(stock, "random", keep=4), lambda: flex.use(stock, 4)):
        with pytest.raises(
            ValueError, match=r"'tokenflex' projector, but the model was loaded with a stock class.*from_p"
        ):
            call()
    assert not any("_vlmcompress" in name for name in stock.__dict__)


@torch.no_grad()
def test_lm_head_is_not_random_after_loading(model, tmp_path):
    """Trap 5: an outside subclass would load a stock checkpoint with its keys unrenamed, lm_head random."""
    model.save_pretrained(tmp_path)
    again = flex.from_pretrained(tmp_path)
    theirs, ours = again.state_dict(), model.state_dict()
    assert set(theirs) == set(ours)
    assert all(theirs[name].equal(tensor) for name, tensor in ours.items())


def test_a_checkpoint_with_lost_tensors_is_refused(model, tmp_path):
    from safetensors.torch import load_file, save_file

    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    for lost, message in (("lm_head", "lacks 1 of the model's tensors, among them lm_head"),
                          ("projector.mlp.gate", "lacks the projector's weights")):  # fmt: skip
        save_file({k: v for k, v in whole.items() if lost not in k}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            flex.from_pretrained(tmp_path)


def test_processor_keeps_its_class_and_its_count(tiny_folder, tmp_path, picture):
    """Trap 4: an unregistered subclass becomes a bare tokenizer under AutoProcessor; ours stays the stock class."""
    from PIL import Image

    for tokens in (1, 4, 25, 36, 100):
        processor = AutoProcessor.from_pretrained(tiny_folder)
        flex.set_tokens(processor, tokens)
        processor.save_pretrained(tmp_path)
        again = AutoProcessor.from_pretrained(tmp_path)
        assert type(again).__name__ == "LlavaProcessor"
        for found in (processor, again):
            inputs = found(images=Image.open(picture), text="<image> what", return_tensors="pt")
            assert int((inputs["input_ids"] == found.image_token_id).sum()) == tokens
            assert found._get_num_multimodal_tokens(image_sizes=[(60, 90)])["num_image_tokens"] == [tokens]


@torch.no_grad()
def test_the_command_line_loads_it(tiny_folder, tmp_path, picture, capsys):
    from vlmcompress.eval.loading import load

    model, processor = load(str(tiny_folder))
    flex.install(model, counts=(4, 9))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(str(tmp_path))
    assert isinstance(again.model.multi_modal_projector, TokenFlexProjector)
    assert again.state_dict()["model.multi_modal_projector.mlp.up.weight"].equal(
        model.state_dict()["model.multi_modal_projector.mlp.up.weight"]
    )
