# SPDX-License-Identifier: Apache-2.0
"""The recipes of CONTRIBUTING.md do what they say, word for word."""

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration

import vlmcompress
from vlmcompress.eval.loading import encode, load, open_image
from vlmcompress.registry import ADAPTERS, METHODS

PAGE = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def recipe(monkeypatch):
    """Run the one block that holds ``word``; what it registers is forgotten afterwards."""
    for registry in (METHODS, ADAPTERS):
        registry.items()
        monkeypatch.setattr(registry, "_items", dict(registry._items))

    def run(word):
        (block,) = [b for b in BLOCKS if word in b]
        exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "recipe"})

    return run


def test_there_are_two_recipes():
    assert len(BLOCKS) == 2


def test_add_a_method(recipe, tiny_folder, picture):
    recipe("register_method")
    assert "longest" in vlmcompress.methods()
    model, processor = load(str(tiny_folder))
    inputs = encode(model, processor, [open_image(picture)] * 2, ["what color is the star ?", "how many"])
    with torch.no_grad():
        features = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        expected = features.norm(dim=-1).topk(9).indices.sort().values
        with vlmcompress.compress(model, "longest", keep=9) as handle:
            model(**inputs)
            kept = [sample.images[0].kept for sample in handle.last.samples]
    assert torch.equal(torch.stack(kept), expected)
    with pytest.raises(ValueError, match="keep"):
        vlmcompress.compress(model, "longest", keep=0)


def test_add_a_family(recipe):
    assert "vipllava" not in vlmcompress.families()
    recipe("register_adapter")
    assert "vipllava" in vlmcompress.families()
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=24, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    config = VipLlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layers=[-2, -3])
    model = VipLlavaForConditionalGeneration(config).eval()
    inputs = {"input_ids": torch.tensor([[5, *[3] * 36, 7, 8]]), "pixel_values": torch.randn(1, 3, 24, 24)}
    with torch.no_grad():
        stock = model(**inputs).logits
        with vlmcompress.compress(model, "vtc-cls", keep=36):
            assert torch.equal(model(**inputs).logits, stock)
        with vlmcompress.compress(model, "vtc-cls", keep=5) as handle:
            model(**inputs)
            assert len(handle.last.samples[0].images[0].kept) == 5
        assert torch.equal(model(**inputs).logits, stock)
