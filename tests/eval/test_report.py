# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vlmcompress
from vlmcompress.eval import flops as counter
from vlmcompress.eval.loading import encode, load, open_image
from vlmcompress.report import Report


@pytest.fixture(scope="module")
def asked(tiny_folder, picture):
    model, processor = load(str(tiny_folder))
    image = open_image(picture)
    return model, encode(model, processor, [image] * 2, ["what color is the star ?", "how many"])


def report_of(asked, method, **options):
    model, inputs = asked
    with vlmcompress.compress(model, method, **options) as handle, torch.no_grad():
        model(**inputs)
        return handle.report()


def test_nothing_is_reported_before_an_image_passed(asked):
    model, inputs = asked
    with vlmcompress.compress(model, "grid", keep=9) as handle:
        with pytest.raises(ValueError, match="image"):
            handle.report()
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:, -3:])
        with pytest.raises(ValueError, match="image"):
            handle.report()
    with pytest.raises(ValueError, match="nothing to report"):
        Report.from_ledger(model.config, None)


def test_keeping_everything_costs_what_the_model_costs(asked):
    report = report_of(asked, "none")
    assert report.flops == report.flops_before
    assert report.kv_bytes == report.kv_bytes_before
    assert report.tokens == report.tokens_before == 72


def test_a_quarter_is_reported_as_a_quarter(asked):
    report = report_of(asked, "grid", keep=9)
    text = str(report)
    assert "visual tokens in" in text
    assert "25.0%" in text
    assert report.layer_averaged_tokens == report.tokens == 18
    assert report.as_dict()["layer_averaged_tokens"] == 18
    # float32, one KV head of 16 numbers, three layers
    assert report.kv_bytes == (18 + report.text_tokens) * 3 * 2 * 16 * 4


def test_a_cut_inside_the_decoder_is_averaged_over_layers(asked):
    report = report_of(asked, "fastv", keep=9, layer=1)
    assert report.layer_tokens == (72, 18, 18) or report.layer_tokens == (72, 72, 18)
    assert report.tokens == 72
    assert report.compressor_flops > 0
    assert report.flops["full"] < report.flops_before["full"]


def test_unknown_flops_are_said_and_the_rest_is_reported(asked, monkeypatch):
    known = report_of(asked, "grid", keep=9)
    monkeypatch.setattr(counter, "LLAVA_LIKE", ())
    report = report_of(asked, "grid", keep=9)
    assert report.flops == report.flops_before == {}
    assert report.note == "FLOPs are not known for the model family 'llava'."
    assert (report.tokens, report.kv_bytes, report.kv_bytes_before) == (18, known.kv_bytes, known.kv_bytes_before)
    text = str(report)
    assert text.splitlines()[-1].strip() == report.note
    assert "visual tokens in" in text
    assert "KV cache" in text
    assert "GFLOPs of the prefill" not in text
