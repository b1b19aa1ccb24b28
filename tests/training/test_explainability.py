# SPDX-License-Identifier: Apache-2.0
"""Labels and training of a relevance predictor on tiny-llava, cut short; and the predictor that is shipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.eval.loading import encode_chats, load
from vlmcompress.relevance import FOLDER, RelevancePredictor, answer_relevance
from vlmcompress.training.explainability import (
    RelevanceData,
    RelevanceRecipe,
    asked,
    collate,
    explain,
    train_explainability,
    write_labels,
)

MODEL = Path(__file__).parents[2] / "assets" / "models" / "tiny-llava"
RECIPE = RelevanceRecipe(str(MODEL), samples=24, chunk=16, label_batch=8, epochs=4, batch=8, validation=16)


@pytest.fixture(scope="module")
def explained():
    model, processor = load(str(MODEL), attn_implementation="eager")
    model.requires_grad_(False)
    return model, processor, list(explain(model, processor, asked(RECIPE, 0), RECIPE))


def test_batches_explain_as_one_by_one(explained):
    model, processor, found = explained
    assert sum(e.right for e in found) > 12 and len(found) == 16
    one = found[3]
    inputs = encode_chats(model, processor, [one.sample.chat()])
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        image = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0]
    place = inputs["input_ids"][0] == model.config.image_token_id
    embeds[0, place] = image
    token = processor.tokenizer.convert_tokens_to_ids(one.prediction)
    modules = [layer.self_attn for layer in adapter_for(model).decoder_layers]
    relevance = answer_relevance(
        modules, lambda x: model(inputs_embeds=x, use_cache=False).logits, embeds, embeds.shape[1], [token]
    )
    torch.testing.assert_close(one.relevance, relevance[0, place], rtol=1e-3, atol=1e-6)


def test_right_answers_only_and_the_rest_resumes(tmp_path):
    files = write_labels(RECIPE, tmp_path)
    assert sum(len(load_file(path)["n"]) for path in files) >= RECIPE.samples
    times = [path.stat().st_mtime_ns for path in files]
    assert write_labels(RECIPE, tmp_path) == files and [p.stat().st_mtime_ns for p in files] == times
    lost = load_file(files[1])
    files[1].unlink()
    write_labels(RECIPE, tmp_path)
    again = load_file(files[1])
    assert lost["map"].equal(again["map"]) and lost["relevance"].equal(again["relevance"])
    data = RelevanceData(files, RECIPE)
    rows = [data[i]["map"] for i in range(len(data))]
    assert not all(
        a.equal(b["map"]) for a, b in zip(rows, (data[i + len(data)] for i in range(len(data))), strict=True)
    )
    batch = collate([data[0], {"map": torch.ones(3), "relevance": torch.ones(3)}])
    assert batch["valid"].sum(1).tolist() == [144, 3]


def test_training_goes_on_where_it_stopped(tmp_path):
    whole = train_explainability(RECIPE, tmp_path / "a.safetensors", tmp_path / "a")
    twice = train_explainability(RECIPE, tmp_path / "b.safetensors", tmp_path / "a")
    assert (tmp_path / "a" / "net" / "measures.jsonl").is_file()
    first, second = load_file(whole), load_file(twice)
    assert all(first[name].equal(second[name]) for name in first)
    model, _ = load(str(MODEL))
    with vlmcompress.compress(model, "explainability", predictor=str(whole), keep=16):
        pass
    with pytest.raises(ValueError, match="leave none"):
        train_explainability(replace(RECIPE, validation=64), tmp_path / "c.safetensors", tmp_path / "a")


def test_the_shipped_predictor_is_small_and_found():
    path = MODEL / FOLDER / "image.safetensors"
    assert path.stat().st_size < 2**20
    assert RelevancePredictor.load(path).options["scale_by_length"]
    model, processor = load(str(MODEL))
    samples = asked(replace(RECIPE, seed=5), 0)[:8]
    inputs = encode_chats(model, processor, [sample.chat() for sample in samples])
    with vlmcompress.compress(model, "explainability", keep=16) as handle, torch.no_grad():
        model.generate(**inputs, do_sample=False, max_new_tokens=2)
        assert handle.last.layer_tokens == [8 * 16] * 5
