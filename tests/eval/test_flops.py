# SPDX-License-Identifier: Apache-2.0
"""The counter meets the published values and torch's own counter."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from models import AHEAD
from models_qwen import prompts_qwen, tiny_qwen
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
)

import vlmcompress
from vlmcompress import Method, Stage
from vlmcompress.compat import cache_keyword
from vlmcompress.eval.flops import (
    CONVENTIONS,
    ModelShape,
    Profile,
    UnknownFlopsError,
    decode_step,
    flops,
    full,
    full_count,
    macs,
)
from vlmcompress.eval.loading import encode, load
from vlmcompress.eval.profiles import compressed
from vlmcompress.views import TowerEdit

TILED = Path(__file__).parents[2] / "assets/models/tiny-llava-next"


def llava_7b(layers: int = 32, d: int = 4096, m: int = 11008, heads: int = 32) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
            image_size=336, patch_size=14, projection_dim=768,
        ),
        text_config=LlamaConfig(
            hidden_size=d, intermediate_size=m, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=32064,
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def shape():
    return ModelShape.from_config(llava_7b())


def high(n: int) -> tuple[float, ...]:
    """TransPrune High: cuts after layers 7, 9 and 12."""
    return (n,) * 7 + (0.875 * n,) * 2 + (0.625 * n,) * 3 + (0.125 * n,) * 20


# arXiv 2507.20630 (TransPrune), tables 1 and 2; the unpruned rows also in FastV, SparseVLM and MustDrop
@pytest.mark.parametrize(("n", "tera"), [(576, 3.82), (192, 1.25), (128, 0.83), (64, 0.42), (2880, 20.83)])
def test_macs_of_a_constant_budget(shape, n, tera):
    assert macs(shape, Profile((n,) * 32)) / 1e12 == pytest.approx(tera, abs=0.005)


@pytest.mark.parametrize(("n", "tera"), [(576, 1.557), (2880, 8.33)])
def test_macs_of_transprune_high(shape, n, tera):
    assert macs(shape, Profile(high(n))) / 1e12 == pytest.approx(tera, abs=0.001)


# GlobalCom², efficiency table, LLaVA-NeXT-7B at retention 100 / 75 / 50 / 25 / 10 %
@pytest.mark.parametrize(("share", "tera"), [(1, 41.65), (0.75, 30.42), (0.5, 19.74), (0.25, 9.60), (0.1, 3.77)])
def test_flops_of_globalcom2(shape, share, tera):
    assert flops(shape, Profile((share * 2880,) * 32)) / 1e12 == pytest.approx(tera, abs=0.006)


@pytest.mark.parametrize(("share", "tera"), [(1, 80.0), (0.5, 38.3), (0.1, 7.4)])
def test_flops_of_globalcom2_13b(share, tera):
    shape = ModelShape.from_config(llava_7b(40, 5120, 13824, 40))
    assert flops(shape, Profile((share * 2880,) * 40)) / 1e12 == pytest.approx(tera, rel=0.01)


def tiny(text: str) -> LlavaConfig:
    sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, vocab_size=99)
    texts = {
        "llama": LlamaConfig(**sizes, num_key_value_heads=4),
        "grouped": LlamaConfig(**sizes, num_key_value_heads=2),
        "head_dim": LlamaConfig(**sizes, num_key_value_heads=1, head_dim=20),
        "qwen2": Qwen2Config(**sizes, num_key_value_heads=2),
    }
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4
    )
    return LlavaConfig(vision_config=vision, text_config=texts[text], image_token_index=98)


@pytest.mark.parametrize("text", ["llama", "grouped", "head_dim", "qwen2"])
def test_full_agrees_with_torch(text):
    config = tiny(text)
    shape = ModelShape.from_config(config)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
        embeds = torch.empty(1, 36 + 11, 48)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.model.vision_tower(torch.empty(1, 3, 24, 24, device="meta")).last_hidden_state
        model.model.multi_modal_projector(features[:, 1:])
        model(inputs_embeds=embeds, logits_to_keep=1)
    ours = full(shape, Profile((36,) * 3, text=11, tower=(37,) * 2, views=1, projected=36))
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_decode_step_agrees_with_torch():
    config = tiny("grouped")
    cache = DynamicCache(config=config.text_config)
    with torch.device("meta"), torch.no_grad():  # on the meta device: torch does not count the CPU's fused attention
        model = LlavaForConditionalGeneration(config).eval().model.language_model
        model(inputs_embeds=torch.empty(1, 20, 48), **{cache_keyword(model): cache})
        with FlopCounterMode(display=False) as counter:
            hidden = model(inputs_embeds=torch.empty(1, 1, 48), **{cache_keyword(model): cache}).last_hidden_state
            hidden @ torch.empty(48, 99)
    assert decode_step(ModelShape.from_config(config), [20] * 3) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_true_size_on_the_meta_device(shape):
    """LLaVA-1.5-7B, 576 visual and 60 text tokens; FlowCut's paper prints 8.82 T for it and 1.95 T at 64."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_7b()).eval()
        embeds = torch.empty(1, 636, 4096)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs_embeds=embeds, logits_to_keep=1)
    count = full_count(shape, Profile((576,) * 32, text=60))
    assert count.decoder + count.lm_head == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert full(shape, Profile((576,) * 32, 60, (577,) * 24, 1, 576)) / 1e12 == pytest.approx(8.82, rel=0.05)


def test_the_compressor_is_inside_every_convention(shape):
    free, paid = Profile((64,) * 32, 60), Profile((64,) * 32, 60, compressor=1e9)
    added = {name: count(shape, paid) - count(shape, free) for name, count in CONVENTIONS.items()}
    assert added == {"macs": 0.5e9, "flops": 1e9, "full": 1e9}


def test_kv_bytes(shape):
    """GlobalCom² prints 377 MB for 720 tokens of LLaVA-NeXT-7B in fp16."""
    assert shape.kv_bytes([720] * 32, 2) / 1e6 == pytest.approx(377, abs=1)


def test_unknown_shapes_are_refused():
    config = llava_7b()
    config.text_config.model_type = "mamba"
    with pytest.raises(ValueError, match="text model 'mamba'"):
        ModelShape.from_config(config)
    with pytest.raises(UnknownFlopsError, match="model family 'llama'"):
        ModelShape.from_config(LlamaConfig())
    config = Qwen2VLConfig()
    config.text_config.model_type = "mamba"
    with pytest.raises(ValueError, match="text model 'mamba'"):
        ModelShape.from_config(config)


@pytest.mark.parametrize("method", ["none", "fastv"])
def test_a_padded_tile_passes_the_projector_whole_where_nothing_is_dropped_before_it(method):
    model, processor = load(str(TILED), attn_implementation="eager")
    noise = np.random.default_rng(0).integers(0, 255, (96, 180, 3), dtype=np.uint8)
    inputs = encode(model, processor, [Image.fromarray(noise)], ["what color is the star ?"])
    ledger, report, total = counted(model, inputs, method)
    views = [n for n, owner in zip(ledger.layout.view_sizes, ledger.layout.view_image, strict=True) if owner == 0]
    assert sum(views) > int(ledger.layout.patch.sum())  # the model crops the padding behind the projector
    assert report.flops["full"] == pytest.approx(total, rel=1e-3)
    assert report.flops_before["full"] >= report.flops["full"]


def test_a_look_from_inside_the_decoder_is_paid_for(qwen):
    looks, blind = (
        counted(qwen, prompts_qwen(TWO_SIZES), "todre", keep=3, depth=(0.5,), tau=0.0, stage2=stage2)[1]
        for stage2 in ("probe", "never")
    )
    assert looks.flops["full"] > blind.flops["full"]
    assert looks.compressor_flops > blind.compressor_flops


# Qwen2-VL: views of different size in one pack ------------------------------------------------------------------------
@dataclass(frozen=True)
class FirstBlocks(Method):
    """Of every view behind vision layer 1: the first third of its blocks of patches, so that lengths stay ragged."""

    name: ClassVar[str] = "first-blocks"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})
    joins_patches: ClassVar[bool] = True

    def tower_layers(self, adapter):
        return (1,)

    def tower(self, layer, state):
        left = [n // 3 * layer.group for n in layer.layout.view_sizes]
        place = torch.arange(max(left)).expand(len(left), -1)
        return TowerEdit(place, valid=place < torch.tensor(left)[:, None])


@pytest.fixture(scope="module")
def qwen():
    return tiny_qwen("eager")  # torch does not count the CPU's fused attention


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def later_qwen(request):
    """Attention windows and a gated feed-forward block in the tower; DeepStack."""
    return tiny_qwen("eager", family=request.param)


TWO_SIZES = [[5, (4, 6), 3, (2, 3), 7]]


def counted(model, inputs, method, **options):
    """The ledger and report of one prefill, and torch's count of it."""
    with vlmcompress.compress(model, method, **options) as handle, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        return handle.last, handle.report(), counter.get_total_flops()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("none", {}),
        ("grid", {"keep": 3}),
        ("vtc-cls", {"keep": 3}),
        ("fastv", {"keep": 3, "layer": 1}),
        ("flowcut", {"keep": 2, "variant": "aligned"}),
        ("mustdrop", {}),
        ("transprune", {}),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_qwen_agrees_with_torch(qwen, method, options):
    _, report, total = counted(qwen, prompts_qwen(TWO_SIZES), method, **options)
    assert report.flops["full"] == pytest.approx(total, rel=0.01)


def test_qwen_uncompressed_is_what_the_stock_model_computes(qwen):
    inputs = prompts_qwen(TWO_SIZES)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        qwen(**inputs, logits_to_keep=1)
    _, report, _ = counted(qwen, inputs, FirstBlocks())
    assert report.flops_before["full"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert report.flops["full"] < report.flops_before["full"]
    # float32, two KV heads of 16 numbers, four layers; a third of 24 and of 6 tokens
    assert report.kv_bytes == (8 + 2 + report.text_tokens) * 4 * 2 * 2 * 16 * 4


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("none", {}),
        ("grid", {"keep": 3}),
        ("vtc-cls", {"keep": 3, "layers": 1}),
        ("fastv", {"keep": 3, "layer": 1}),
        (FirstBlocks(), {}),
    ],
    ids=["none", "grid", "vtc-cls", "fastv", "in-tower"],
)
def test_later_qwen_agrees_with_torch(later_qwen, method, options):
    inputs = prompts_qwen([[5, (4, 6), 3, (3, 8), 7]], family=later_qwen.config.model_type)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        later_qwen(**inputs, logits_to_keep=1)
    _, report, total = counted(later_qwen, inputs, method, **options)
    assert report.flops_before["full"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert report.flops["full"] == pytest.approx(total, rel=0.01)


def test_every_view_attends_to_itself_only(qwen):
    ledger, report, total = counted(qwen, prompts_qwen(TWO_SIZES), FirstBlocks())
    shape = ModelShape.from_config(qwen.config)
    (profile,) = compressed(shape, ledger)
    assert [v.tolist() for v in ledger.tower_views] == [[96, 24]] * 2 + [[32, 8]] * 2
    assert profile.tower == (120, 120, 40, 40)
    assert profile.tower_pairs == (96**2 + 24**2,) * 2 + (32**2 + 8**2,) * 2
    assert profile.projected == 10
    # the projector runs on two images padded to eight tokens; padding is not counted
    padding = sum(2 * (2 * 8 - 10) * a * b for a, b in shape.projector)
    assert report.flops["full"] + padding == pytest.approx(total, rel=0.001)


def test_qwen_samples_of_a_batch_cost_what_they_cost_alone(qwen):
    shape = ModelShape.from_config(qwen.config)
    spec = [[5, (4, 6), 3, (2, 3), 7], [9, (3, 4), 2], [6]]
    together, _, _ = counted(qwen, prompts_qwen(spec), FirstBlocks())
    alone = [counted(qwen, prompts_qwen([row]), FirstBlocks())[0] for row in spec[:2]]
    *pictured, text_only = [full(shape, p) for p in compressed(shape, together)]
    assert pictured == [full(shape, compressed(shape, ledger)[0]) for ledger in alone]
    assert text_only == full(shape, Profile((0,) * 4, text=6))


def test_rows_that_share_an_image_pay_for_it_once(qwen):
    inputs = prompts_qwen([[5, (4, 6), 7]])
    shape = ModelShape.from_config(qwen.config)
    once, _, _ = counted(qwen, inputs, "grid", keep=6)
    with vlmcompress.compress(qwen, "grid", keep=6) as handle, torch.no_grad():
        qwen.generate(**inputs, num_beams=2, max_new_tokens=2, do_sample=False)
        beams = handle.last
    (alone,), (first, second) = compressed(shape, once), compressed(shape, beams)
    assert first == alone
    # transformers 5.16 hands the pixels of every beam to the tower
    again = (0, 0) if AHEAD else (alone.views, alone.projected)
    assert (second.views, second.projected, second.visual) == (*again, alone.visual)
