# SPDX-License-Identifier: Apache-2.0
"""The benchmark by stage, on models small enough for a test."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from models import prompts, tiny_llava

from vlmcompress.baselines.fastv import FastV
from vlmcompress.baselines.grid import Grid
from vlmcompress.cli import app
from vlmcompress.commands import bench_gpu
from vlmcompress.eval import limit, stages, synthetic
from vlmcompress.methods.h2o import H2O

NEXT = str(Path(__file__).parents[2] / "assets/models/tiny-llava-next")


@dataclass(frozen=True)
class SlowGrid(Grid):
    def entry(self, tokens, state):
        time.sleep(0.05)
        return super().entry(tokens, state)


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def inputs():
    return prompts([[5, "image", 7]], 36)


def test_a_slow_method_shows_in_its_part_and_in_the_whole(model, inputs):
    ticks = []
    found = stages.measure(
        model, inputs, {"slow": SlowGrid(keep=4)}, rounds=2, new_tokens=3, tick=lambda: ticks.append(1)
    )
    assert len(ticks) == 3 * 2  # a warm-up and two rounds
    slow, stock = found["slow"]["ms"], found["uncompressed"]["ms"]
    assert set(slow) == set(stages.PARTS)
    assert slow["method"]["median"] >= 50 and stock["method"]["median"] == 0
    assert slow["prefill"]["median"] > slow["method"]["median"]
    assert slow["decode"]["median"] < 50
    for part in (slow, stock):
        assert part["tower"]["median"] + part["projector"]["median"] < part["prefill"]["median"]
        assert part["prefill"]["median"] + 2 * part["decode"]["p10"] < part["end_to_end"]["p90"]
        assert all(clock["runs"] == 2 for clock in part.values())


def test_memory_of_prefill_and_cache(model, inputs):
    methods = {"grid": Grid(keep=4), "fastv": FastV(keep=4, layer=1), "h2o": H2O(heavy=2, recent=2)}
    found = stages.measure(model, inputs, methods, rounds=1, new_tokens=2)
    text = model.config.text_config
    entry = text.num_hidden_layers * 2 * text.num_key_value_heads * 4 * (text.hidden_size // text.num_attention_heads)
    prompt = inputs["input_ids"].shape[1]
    assert found["uncompressed"]["cache_bytes"] == prompt * entry
    assert found["grid"]["cache_bytes"] == (prompt - 32) * entry
    assert found["h2o"]["cache_bytes"] == 4 * entry
    assert found["fastv"]["layer_average"] < 36
    assert all(row["peak_bytes"] > 0 for row in found.values())
    assert found["uncompressed"]["speedup"] == {"prefill": 1, "decode": 1, "end_to_end": 1}


def test_nothing_is_left_on_the_model(model, inputs):
    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    stages.measure(model, inputs, {"grid": Grid(keep=4)}, rounds=1, new_tokens=2)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before


def test_zeros_and_a_single_token_are_refused(model, inputs):
    zeros = inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])}
    with pytest.raises(ValueError, match="'pixel_values' holds nothing but zeros"):
        stages.measure(model, zeros, {}, rounds=1)
    with pytest.raises(ValueError, match="new_tokens is at least 2"):
        stages.measure(model, inputs, {}, rounds=1, new_tokens=1)


def test_rows_of_a_batch_have_pictures_of_their_own(model):
    one = synthetic.prompt(model, (48, 48), 10)
    three = synthetic.batch_of(one, 3, torch.float64)
    assert three["input_ids"].tolist() == one["input_ids"].tolist() * 3
    assert three["pixel_values"].dtype == torch.float64
    assert len({row.sum().item() for row in three["pixel_values"]}) == 3


def test_the_cells_of_the_gpu_benchmark(monkeypatch):
    """What runs on a GPU, on the CPU with a small architecture: batches, memory that does not suffice, time that is up."""
    monkeypatch.setattr(bench_gpu, "SHAPES", {NEXT: ((96, 96), {"vtc-cls": {"keep": 1 / 9}})})
    monkeypatch.setattr(bench_gpu, "BATCHES", (1, 2, 4, 8))
    monkeypatch.setattr(bench_gpu, "NEW_TOKENS", 2)
    measure = stages.measure

    def short_of_memory(model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == 4:
            raise torch.cuda.OutOfMemoryError("too much")
        return measure(model, inputs, *args, **kwargs)

    monkeypatch.setattr(stages, "measure", short_of_memory)
    times = iter([False] * 4 + [True] * 10)
    found = list(bench_gpu.cells({"limit": {}}, 2, "cpu", lambda: next(times)))
    assert [cell["batch"] for cell in found][:4] == [1, 2, 4, 8]
    assert [cell.get("error") for cell in found][:4] == [None, None, "out of memory", "the time was up"]
    first = found[0]
    assert first["attention"] == "sdpa" and first["rounds"] in (2, 3) and first["visual_tokens"] > 0
    assert first["cases"]["vtc-cls"]["layer_average"] < first["visual_tokens"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path):
    with pytest.raises(ValueError, match="There is no GPU here"):
        app(["bench", "gpu", "--out", str(tmp_path)], standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_the_file_says_on_what_it_was_measured(tmp_path, monkeypatch):
    config = limit.cpu_shape()
    vision, text = config.vision_config, config.text_config
    vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads = 32, 32, 5, 2
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 64, 4
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 2, 32
    monkeypatch.setattr(limit, "cpu_shape", lambda: config)
    app(["bench", "stages", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)], standalone_mode=False)
    (path,) = tmp_path.iterdir()
    report = json.loads(path.read_text())
    assert path.name.startswith("bench-stages-") and torch.__version__.split("+")[0] in path.name
    assert report["environment"]["threads"] == 1 and report["environment"]["torch"] == torch.__version__
    assert report["command"] == "vlmcompress bench stages --rounds 1 --threads 1 --device cpu"
    cases = report["cases"]
    assert list(cases) == ["uncompressed", "vtc-cls", "flowcut", "fastv", "h2o"]
    assert cases["vtc-cls"]["layer_average"] == cases["flowcut"]["layer_average"] == 64
    assert cases["h2o"]["cache_bytes"] < 0.21 * cases["uncompressed"]["cache_bytes"]
