# SPDX-License-Identifier: Apache-2.0
"""Costs at true size without weights: presets, narrow twins, and the command."""

import json
import re

import pytest
import torch
from models import tiny_llava
from transformers import AutoModelForImageTextToText

import vlmcompress
from vlmcompress.commands.flops import image_size
from vlmcompress.eval import narrow, synthetic, truesize
from vlmcompress.eval.flops import ModelShape, Profile, macs
from vlmcompress.eval.presets import load_config, presets, published_parameters


@pytest.mark.parametrize("name", presets())
def test_a_preset_has_the_published_size(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(load_config(name))
    size = sum(p.numel() for p in model.parameters())
    assert f"{size / 1e9:.2f} B" == published_parameters(name)


def test_every_stage_of_llava_7b():
    found = truesize.count(load_config("llava-1.5-7b"), "vtc-cls", {"keep": 64})
    before, after = found.uncompressed, found.compressed
    assert (found.parameters, found.text_tokens, found.varies) == (7_063_427_072, 60, False)
    assert before.visual_tokens == (576,) * 32 and after.visual_tokens == (64,) * 32
    # FlowCut's paper prints 8.82 T for the uncompressed model
    assert before.full / 1e12 == pytest.approx(8.82, rel=0.05)
    # the published rule for visual tokens only (TransPrune, MustDrop): 3.82 and 0.42 TMACs
    assert (before.macs - before.compressor) / 1e12 == pytest.approx(3.82, abs=0.005)
    assert after.macs / 1e12 == pytest.approx(0.42, abs=0.005)
    assert after.tower == before.tower and after.projector == pytest.approx(before.projector / 9)
    assert sum(after.kv_bytes) == (64 + 60) * 32 * 2 * 4096 * 2
    # one decoder layer on a cache is one token through its weights, and a row of attention
    weights = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert after.decode_step - after.lm_head == pytest.approx(32 * (weights + 4 * 125 * 4096), rel=1e-6)


def test_the_compressor_costs_at_true_width_what_it_reports_there():
    """The polynomial through the twins meets the model itself where that one is small enough to run."""
    model = tiny_llava()
    config = model.config
    assert narrow.factor(config) > 1
    found = truesize.count(config, "vtc-cls", {"keep": 4}, text_tokens=10)
    inputs = synthetic.prompt(model, (40, 40), 10)
    with vlmcompress.compress(model, "vtc-cls", keep=4) as handle, torch.no_grad():
        model(**inputs)
        assert found.compressed.compressor == handle.last.compressor_flops > 0


def test_a_polynomial_of_degree_two_is_met_exactly():
    def cost(w):
        return 5 * w * w + 7 * w + 11

    assert narrow.compressor_flops([cost(s) for s in narrow.STEPS], narrow.STEPS, 128) == cost(128)


def test_a_schedule_is_counted_layer_by_layer():
    """TransPrune's preset on LLaVA-1.5-7B: its paper prints 1.56 TMACs, the scores' own cost left out."""
    config = load_config("llava-1.5-7b")
    found = truesize.count(config, "transprune", {"preset": "high"})
    tokens = found.compressed.visual_tokens
    assert tokens[0] == 576 and tokens[-1] == 72
    assert macs(ModelShape.from_config(config), Profile(tokens)) / 1e12 == pytest.approx(1.56, abs=0.005)
    cheaper = [b < a for a, b in zip(found.uncompressed.decoder, found.compressed.decoder, strict=True)]
    assert cheaper == [n < 576 for n in tokens]


def test_a_packed_tower_is_counted_on_its_real_modules():
    found = truesize.count(load_config("qwen2-vl-7b"), "grid", {"keep": 0.25}, image=(112, 168))
    assert found.uncompressed.visual_tokens == (24,) * 28 and found.compressed.visual_tokens == (6,) * 28
    assert found.compressed.tower == found.uncompressed.tower


def test_a_formula_that_is_off_is_not_shown(monkeypatch):
    monkeypatch.setattr(truesize, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="more than"):
        truesize.count(load_config("llava-1.5-7b"), "grid", {"keep": 4})


def test_the_command_prints_and_writes(tmp_path, capsys):
    from vlmcompress.cli import app

    path = tmp_path / "flops.json"
    app(["flops", "llava-1.5-7b", "--method", "grid", "--keep", "64", "--json", str(path)], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "7.06 B" in shown and re.search(r"decoder layers 0–31", shown)
    report = json.loads(path.read_text())
    assert report["schema"] == "vlmcompress.flops/1"
    assert report["compressed"]["full"] < report["uncompressed"]["full"]


@pytest.mark.parametrize("text", ["672", "0x10", "axb", "10x"])
def test_an_image_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        image_size(text)


def test_an_unknown_model_names_the_presets():
    with pytest.raises(ValueError, match=r"presets: .*llava-1\.5-7b"):
        load_config("no-such-thing")
