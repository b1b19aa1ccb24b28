# SPDX-License-Identifier: Apache-2.0
"""VTC-CLS against numbers from the authors' code, through ``compress`` on the stock LLaVA class."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from vectors import cases

import vlmcompress
from vlmcompress.ops.select import top_indices

IMAGE = 1


def build(tensors: dict, info: dict, text: LlamaConfig) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(**info["vision_config"])
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=info["vision_feature_layer"],
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config).eval()
    tower = {k[len("w.vision.") :]: v for k, v in tensors.items() if k.startswith("w.vision.")}
    missing, unexpected = model.model.vision_tower.load_state_dict(
        {k.removeprefix("vision_model."): v for k, v in tower.items()}, strict=False
    )
    assert not unexpected and all("position_ids" in m for m in missing)
    prefix = "w.llava.model.mm_projector." if info["kind"] == "end_to_end" else "w.projector."
    projector = model.model.multi_modal_projector
    if f"{prefix}0.weight" not in tensors:
        return model
    for old, linear in (("0", projector.linear_1), ("2", projector.linear_2)):
        linear.load_state_dict({part: tensors[f"{prefix}{old}.{part}"] for part in ("weight", "bias")})
    return model


def text_config(width: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=32
    )


@pytest.mark.parametrize("path", cases("vtc-cls", kind=("vision", "vision_batch")), ids=lambda p: p.stem)
def test_tower_cases(path):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    model = build(tensors, info, text_config(48))
    pixels = tensors["in.pixel_values"]
    ids = torch.full((len(pixels), 2 + info["num_patches"]), IMAGE)
    ids[:, 0], ids[:, -1] = 5, 6
    options = {"start_layer": info["start_layer"]} if info["case"] % 2 else {"layers": info["K"]}
    with torch.no_grad(), vlmcompress.compress(model, "vtc-cls", keep=info["token_num"], **options) as handle:
        features = model.model.get_image_features(pixels).pooler_output
        model(input_ids=ids, pixel_values=pixels)
        images = [s.images[0] for s in handle.last.samples]
    for number, image in enumerate(images):
        pick = number if len(images) > 1 else ...
        torch.testing.assert_close(image.kept, tensors["out.kept_indices"][pick])
        torch.testing.assert_close(image.scores(), tensors["out.score"][pick], atol=1e-6, rtol=0)
        if "out.projected_kept" in tensors:
            torch.testing.assert_close(
                features[number][image.kept], tensors["out.projected_kept"][pick], atol=2e-4, rtol=1e-4
            )


@pytest.mark.parametrize("path", cases("vtc-cls", kind=("vision",)), ids=lambda p: p.stem)
@pytest.mark.parametrize("ensemble", ["max", "min"])
def test_other_ensembles(path, ensemble):
    """The case's rows of every layer, joined otherwise."""
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    model = build(tensors, info, text_config(48))
    ids = torch.full((1, 2 + info["num_patches"]), IMAGE)
    ids[:, 0], ids[:, -1] = 5, 6
    options = {"start_layer": info["start_layer"], "ensemble": ensemble}
    with torch.no_grad(), vlmcompress.compress(model, "vtc-cls", keep=info["token_num"], **options) as handle:
        model(input_ids=ids, pixel_values=tensors["in.pixel_values"])
    rows = tensors["out.cls_attn_per_layer"][info["layers_used"]]
    expected = getattr(rows, f"a{ensemble}")(0)
    image = handle.last.samples[0].images[0]
    torch.testing.assert_close(image.scores(), expected, atol=1e-6, rtol=0)
    assert image.kept.equal(top_indices(image.scores()[None], [info["token_num"]])[0])


@pytest.mark.parametrize("path", cases("vtc-cls", kind=("select",)), ids=lambda p: p.stem)
def test_selection_with_ties(path):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    kept = top_indices(tensors["in.score"][None], [info["token_num"]])[0]
    torch.testing.assert_close(kept, tensors["out.kept_indices"])


@pytest.mark.parametrize("path", cases("vtc-cls", kind=("end_to_end",)), ids=lambda p: p.stem)
def test_end_to_end(path):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    model = build(tensors, info, LlamaConfig(**info["llm_config"]))
    llava = {k[len("w.llava.") :]: v for k, v in tensors.items() if k.startswith("w.llava.")}
    model.model.language_model.load_state_dict(
        {k[len("model.") :]: v for k, v in llava.items() if k.startswith("model.") and "mm_projector" not in k},
        strict=False,
    )
    model.lm_head.load_state_dict({"weight": llava["lm_head.weight"]})
    ids, patches = (
        tensors["in.input_ids"].flatten(),
        (info["vision_config"]["image_size"] // info["vision_config"]["patch_size"]) ** 2,
    )
    at = int((ids == -200).nonzero())
    free = next(t for t in range(model.config.text_config.vocab_size) if t not in ids.tolist())
    model.config.image_token_id = free
    ids = torch.cat([ids[:at], torch.full((patches,), free), ids[at + 1 :]])[None]
    options = {"start_layer": info["start_layer"]}
    with torch.no_grad(), vlmcompress.compress(model, "vtc-cls", keep=info["token_num"], **options) as handle:
        logits = model(input_ids=ids, pixel_values=tensors["in.pixel_values"]).logits[0]
        kept = handle.last.samples[0].images[0].kept
        positions = handle.last.positions
        new = model.generate(
            input_ids=ids, pixel_values=tensors["in.pixel_values"], max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
    torch.testing.assert_close(kept, tensors["out.kept_indices"])
    assert positions.flatten().tolist() == list(range(len(tensors["out.logits"])))
    stays = torch.cat([torch.arange(at), at + kept, torch.arange(at + patches, ids.shape[1])])
    torch.testing.assert_close(logits[stays], tensors["out.logits"], atol=1e-3, rtol=1e-3)
    assert new[0, : ids.shape[1]].equal(ids[0])
    assert new[0, ids.shape[1] :].tolist() == tensors["out.generated"].flatten().tolist()
