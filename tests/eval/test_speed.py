# SPDX-License-Identifier: Apache-2.0
"""The benchmark of all methods, on models small enough for a test."""

import time
from dataclasses import dataclass

import pytest
import torch
from models import prompts, tiny_llava
from models_next import prompts_next, tiny_next

from vlmcompress.baselines.fastv import FastV
from vlmcompress.baselines.grid import Grid
from vlmcompress.commands import bench_methods
from vlmcompress.eval import memory, speed
from vlmcompress.method import Method, Stage
from vlmcompress.methods.flowcut import FlowCut
from vlmcompress.methods.globalcom2 import GlobalCom2


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def inputs(model):
    return prompts([[5, "image", 7]], 36)


def test_prefills_are_compared_with_what_the_flops_say(model, inputs):
    ticks = []
    found = speed.compare(model, inputs, {"grid": Grid(keep=4), "fastv": FastV(keep=4)}, 2, lambda: ticks.append(1))
    assert len(ticks) == 3 * 3  # a warm-up and two rounds of three cases
    grid, fastv = found["methods"]["grid"], found["methods"]["fastv"]
    assert (grid["tokens_in"], grid["tokens_out"], grid["layer_average"]) == (4, 4, 4.0)
    assert fastv["tokens_in"] > fastv["layer_average"] > fastv["tokens_out"] == 4
    assert grid["predicted"] > fastv["predicted"] > 1
    for row in (grid, fastv):
        assert row["speedup"] > 0
        assert row["of_predicted"] == pytest.approx(row["speedup"] / row["predicted"])
    assert not hasattr(model, "_vlmcompress_handle")


def test_a_slow_cut_is_seen(model, inputs):
    """Work in a cut is counted as the cut's, and the hooks are gone afterwards."""

    @dataclass(frozen=True)
    class Sleepy(FastV):
        def prefill(self, layer, state):
            end = time.process_time() + 0.3
            while time.process_time() < end:
                pass
            return super().prefill(layer, state)

    before = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    found = speed.cut_cost(model, inputs, {"quick": FastV(keep=4), "slow": Sleepy(keep=4)}, 3, lambda: None)
    assert found["quick"]["cuts"] == found["slow"]["cuts"] == 1
    assert found["slow"]["ms_per_cut"] - found["quick"]["ms_per_cut"] > 200
    assert found["slow"]["of_prefill"] > found["quick"]["of_prefill"]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == before


def test_towers_are_compared(model, inputs):
    found = speed.tower_cost(model, inputs["pixel_values"], {"flowcut": FlowCut(keep=4)}, 2, lambda: None)
    assert found["uncompressed"]["tower_ms"]["runs"] == 2
    assert found["flowcut"]["over_stock"] > 0
    assert not model.model.vision_tower._forward_hooks


def test_the_stages_of_globalcom2_are_timed():
    model = tiny_next()
    inputs = prompts_next(model, [[5, "square", 7]])
    spent = speed.compare(model, inputs, {"globalcom2": GlobalCom2(keep=0.25)}, 2, lambda: None)
    own = spent["methods"]["globalcom2"]["own_ms"]
    assert set(own) == {"tower", "entry"}
    assert min(own.values()) > 0


def test_the_tiled_prompt_fits_its_model():
    """One token more or less and the stock model would refuse it."""
    config = speed.tiled_shape()
    config.vision_config.num_hidden_layers, config.vision_config.hidden_size = 2, 32
    config.vision_config.intermediate_size, config.vision_config.num_attention_heads = 32, 2
    config.text_config.hidden_size, config.text_config.intermediate_size = 32, 32
    config.text_config.num_hidden_layers, config.text_config.num_attention_heads = 1, 2
    config.text_config.num_key_value_heads, config.text_config.head_dim = 2, 16
    from transformers import LlavaNextForConditionalGeneration

    model = LlavaNextForConditionalGeneration(config).eval()
    inputs = speed.tiled_prompt(model, "cpu", torch.float32)
    with torch.inference_mode():
        assert speed.prefill(model, inputs).logits.shape[1] == 1
    assert int((inputs["input_ids"] == config.image_token_id).sum()) == 576 + 48 * 49


@pytest.fixture
def small_shape(monkeypatch):
    from vlmcompress.eval import limit

    config = limit.cpu_shape()
    config.vision_config.hidden_size = config.vision_config.intermediate_size = 16
    config.vision_config.num_attention_heads = 2
    config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 8
    monkeypatch.setattr(limit, "cpu_shape", lambda: config)


@dataclass(frozen=True)
class Greedy(Method):
    """Asks for every attention row at once, which makes the tensor that the benchmark is there to find."""

    name = "greedy"
    stages = frozenset({Stage.PREFILL})

    def cut_layers(self, adapter):
        return (1,)

    def prefill(self, layer, state):
        layer.attention(torch.arange(layer.hidden.shape[1])[None])


def test_a_heads_n_n_tensor_shows_in_the_peak(small_shape, monkeypatch):
    from vlmcompress.registry import METHODS

    monkeypatch.setitem(METHODS._items, "greedy", Greedy)
    stock, fastv, greedy = (
        memory.peak(n, o, 16, 32) for n, o in (("none", {}), ("fastv", {"keep": 28}), ("greedy", {}))
    )
    assert stock["layer_average"] == greedy["layer_average"] == 256 > fastv["layer_average"]
    sequence = 256 + 60
    assert greedy["tensors"] - stock["tensors"] > 0.5 * 8 * sequence**2 * 4
    assert fastv["tensors"] <= 1.02 * stock["tensors"]
    assert stock["resident"] > 0


def test_memory_is_measured_in_processes_of_their_own():
    ticks = []
    found = memory.measure({"fastv": {"keep": 16}}, 1, lambda: ticks.append(1), side=12, width=128)
    assert len(ticks) == 2
    assert found["visual_tokens"] == found["uncompressed"]["layer_average"] == 144
    row, stock = found["methods"]["fastv"], found["uncompressed"]
    assert row["layer_average"] == (144 + 144 + 16 + 16) / 4
    assert row["resident_over_uncompressed"] == pytest.approx(row["resident"] / stock["resident"])
    assert 0 < row["tensors_over_uncompressed"] < 1.05
    assert found["heads_n_n_bytes"] == 16 * (144 + 60) ** 2 * 4


def test_every_method_of_the_benchmark_can_be_made():
    for chosen in (bench_methods.BEFORE, bench_methods.INSIDE, bench_methods.TILED):
        assert list(bench_methods._methods(chosen)) == list(chosen)
