# SPDX-License-Identifier: Apache-2.0
"""Placeholders that vLLM's processors write are the rows that the encoder makes: image sizes × budgets, no engine."""

from __future__ import annotations

import pytest
import torch
from serving.engine.conftest import TINY
from serving.engine.test_families import MARK, folder_of, noise
from vllm.config import ModelConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.plugins import load_general_plugins

from vlmcompress.method import create
from vlmcompress.serving.counting import runs
from vlmcompress.serving.half import vision_half
from vlmcompress.serving.tokens import VisualEncoder

SIZES = [(8, 8), (24, 24), (60, 50), (30, 90), (96, 96), (131, 37), (37, 131), (200, 200)]
FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl")
BUDGETS = [
    ("vtc-cls", {"keep": 1, "newlines": False}),
    ("vtc-cls", {"keep": 16, "newlines": False}),
    ("vtc-cls", {"keep": 0.4, "newlines": False}),
    ("vtc-cls", {"keep": 10**4}),
    ("grid", {"keep": 11}),
    ("pool", {"keep": 0.3}),
    ("globalcom2", {"keep": 0.25, "exact_budget": True}),
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    family = request.param
    folder = TINY if family == "llava" else folder_of(family, tmp_path_factory.mktemp("models"))[1]
    load_general_plugins()
    load_general_plugins()  # once more changes nothing
    return family, folder


def processor_of(folder, entry: dict):
    config = ModelConfig(
        str(folder), dtype="float32", max_model_len=2048, seed=0, mm_processor_cache_gb=0, limit_mm_per_prompt={"image": 4},
        hf_overrides={"vlmcompress": entry},
    )  # fmt: skip
    return MULTIMODAL_REGISTRY.create_processor(config), config.hf_config


def given_of(family: str, config, items) -> dict:
    """The arguments of ``get_image_features`` in the processed items of one prompt."""
    data = [{name: field.data for name, field in item.items()} for item in items]
    pixels = [item["pixel_values"] for item in data]
    if family == "llava":
        return {"pixel_values": torch.stack(pixels)}
    if family.startswith("qwen"):
        grids = torch.stack([item["image_grid_thw"] for item in data])
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": grids}
    if family == "internvl":
        marks = runs([len(views) * config.image_seq_length for views in pixels])
        return {"pixel_values": torch.cat(pixels), "placeholders": marks}
    sizes = torch.stack([item["image_sizes"] for item in data])
    given = {"pixel_values": torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True), "image_sizes": sizes}
    return given | ({"batch_num_images": torch.ones(len(data), dtype=torch.long)} if "onevision" in family else {})


@pytest.mark.parametrize(("method", "options"), BUDGETS, ids=lambda value: str(value))
def test_placeholders_are_rows(model, method, options):
    family, folder = model
    processor, config = processor_of(folder, {"method": method, **options})
    encoder = VisualEncoder(vision_half(config), create(method, **options))
    mark = MARK.get(family, "<image>")
    # vLLM and transformers differ on OneVision's prompts of several images, see docs/serving.md
    prompts = [[size] for size in SIZES] + ([] if family == "llava_onevision" else [SIZES[2:5]])
    for sizes in prompts:
        images = processor.info.parse_mm_data({"image": [noise(size) for size in sizes]})
        prompt = processor.info.get_tokenizer().encode(f"{mark} a" * len(sizes))
        inputs = ProcessorInputs(prompt=prompt, mm_data_items=images)
        found = processor.apply(inputs, TimingContext(enabled=False))
        counts = [place.get_num_embeds() for place in found["mm_placeholders"]["image"]]
        rows = [len(tokens) for tokens in encoder(given_of(family, config, found["mm_kwargs"]["image"]))]
        assert counts == rows, sizes
        assert found["prompt_token_ids"].count(config.image_token_id) == sum(rows)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"method": "fastv"}, "inside the language model.*'vtc-cls'"),
        ({"method": "mustdrop"}, "cannot be served"),
        ({"method": "vtc"}, "There is no method 'vtc'"),
        ({"method": "vtc-cls", "keep": 0}, "keeps nothing"),
        ({"method": "vtc-cls", "keep": 2.5}, "is outside"),
    ],
)
def test_settings_that_cannot_be_served_are_refused_at_the_start(model, entry, words):
    with pytest.raises(ValueError, match=words):
        processor_of(model[1], entry)
