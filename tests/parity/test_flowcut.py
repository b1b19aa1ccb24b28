# SPDX-License-Identifier: Apache-2.0
"""FlowCut against numbers from the authors' code, through ``compress`` on stock classes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from vectors import cases

import vlmcompress
from vlmcompress.methods.flowcut import FlowCut
from vlmcompress.ops.flowcut import cut_sizes, entropy_ratio, flow_score, shares, value_magnitude


def read(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def pick(tensors, prefix):
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def build(info, tensors, text: LlamaConfig, image: int = 1) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**info["vision_config"]), text_config=text, image_token_id=image,
        vision_feature_layer=info.get("vision_feature_layer", -2), vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    load_tower(model.model.vision_tower, tensors)
    return model


def load_tower(tower, tensors):
    weights = {k.removeprefix("vision_model."): v for k, v in pick(tensors, "w.vision.").items()}
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("position_ids" in m for m in missing)


def run_tower(model, info, pixels, **options):
    """Kept indices and the feature layer's output rows (CLS first) for every image."""
    seen = {}
    layer = model.model.vision_tower.encoder.layers[model.config.vision_feature_layer]
    ids = torch.full((len(pixels), 2 + info["num_patches"]), 1)
    ids[:, 0], ids[:, -1] = 5, 6
    with vlmcompress.compress(model, "flowcut", **options) as handle, torch.no_grad():
        hook = layer.register_forward_hook(lambda m, a, out: seen.update(out=out[0] if isinstance(out, tuple) else out))
        model(input_ids=ids, pixel_values=pixels)
        hook.remove()
        kept = torch.stack([s.images[0].kept for s in handle.last.samples])
        tokens = handle.last.tower_tokens
    return kept, seen["out"], tokens


TINY = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=32)


@pytest.mark.parametrize("path", cases("flowcut", kind=("clip_vision",)), ids=lambda p: p.stem)
def test_clip_tower(path):
    info, tensors = read(path)
    model = build(info, tensors, TINY)
    # a budget that counts the CLS row (case 08) leaves one patch less
    keep = info["target_including_cls"] - 1
    coupled = info["batch"] > 1
    kept, rows, tokens = run_tower(model, info, tensors["in.pixel_values"], keep=keep, official_coupling=coupled)
    with_cls = info["select_feature"] == "cls_patch"
    # where nothing leaves (case 09) the official list has one entry too many
    assert kept.equal(tensors["out.keep_indices"][:, :keep])
    close = dict(atol=5e-4 if info["case"] == 10 else 2e-4, rtol=1e-4)  # case 10: very peaky attention
    torch.testing.assert_close(rows[:, 0 if with_cls else 1 :], tensors["out.features"], **close)
    assert tokens[:-1] == [info["batch"] * (row["patches_in"] + 1) for row in info["schedule"]][: len(tokens) - 1]
    if coupled:
        kept, rows, _ = run_tower(model, info, tensors["in.pixel_values"], keep=keep)
        assert kept.equal(tensors["out.single.keep_indices"])
        torch.testing.assert_close(rows[:, 1:], tensors["out.single.features"], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("path", cases("flowcut", kind=("llava15_end_to_end",)), ids=lambda p: p.stem)
def test_llava_end_to_end(path):
    info, tensors = read(path)
    ids = tensors["in.input_ids"].flatten()
    at, patches = int((ids == -200).nonzero()), info["num_patches"]
    free = next(t for t in range(info["llm_config"]["vocab_size"]) if t not in ids.tolist())
    model = build(info, tensors, LlamaConfig(**info["llm_config"]), free)
    load_language_model(model, tensors)
    inputs = {
        "input_ids": torch.cat([ids[:at], torch.full((patches,), free), ids[at + 1 :]])[None],
        "pixel_values": tensors["in.pixel_values"],
    }
    with torch.no_grad(), vlmcompress.compress(model, "flowcut", keep=info["target_num"]) as handle:
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        logits = model(**inputs).logits[0]
        kept, positions = handle.last.samples[0].images[0].kept, handle.last.positions
        new = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert kept.equal(tensors["out.keep_indices"][0])
    torch.testing.assert_close(features[kept], tensors["out.projected"][0], atol=2e-4, rtol=1e-4)
    assert positions.flatten().tolist() == list(range(tensors["out.logits"].shape[1]))
    stays = torch.cat([torch.arange(at), at + kept, torch.arange(at + patches, inputs["input_ids"].shape[1])])
    torch.testing.assert_close(logits[stays], tensors["out.logits"][0], atol=1e-3, rtol=1e-3)
    assert new[0, inputs["input_ids"].shape[1] :].tolist() == tensors["out.generated"].flatten().tolist()


def load_language_model(model, tensors):
    llava = pick(tensors, "w.llava.")
    projector = model.model.multi_modal_projector
    for old, linear in (("0", projector.linear_1), ("2", projector.linear_2)):
        linear.load_state_dict({part: llava[f"model.mm_projector.{old}.{part}"] for part in ("weight", "bias")})
    other = ("mm_projector", "image_newline", "vision_tower")
    weights = {k: v for k, v in pick(llava, "model.").items() if not k.startswith(other)}
    model.model.language_model.load_state_dict(weights, strict=False)
    model.lm_head.load_state_dict({"weight": llava["lm_head.weight"]})


@pytest.mark.parametrize("path", cases("flowcut", kind=("llava_next_end_to_end",)), ids=lambda p: p.stem)
@torch.no_grad()
def test_llava_next_end_to_end(path):
    info, tensors = read(path)
    ids = tensors["in.input_ids"].flatten()
    at = int((ids == -200).nonzero())
    free = next(t for t in range(info["llm_config"]["vocab_size"]) if t not in ids.tolist())
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**info["vision_config"]), text_config=LlamaConfig(**info["llm_config"]),
        image_grid_pinpoints=info["grid_pinpoints_hw_or_wh"], image_token_id=free,
        vision_feature_layer=info["vision_feature_layer"], vision_feature_select_strategy="default",
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config).eval()
    load_tower(model.model.vision_tower, tensors)
    load_language_model(model, tensors)
    width, height = info["image_size_wh"]
    if "unpad" not in info["mm_patch_merge_type"]:  # the stock model cuts padding off; a picture without any is alike
        width, height = (n * info["vision_config"]["image_size"] for n in info["crops_grid_wh"])
    inputs = {"pixel_values": tensors["in.pixel_values"][None], "image_sizes": torch.tensor([[height, width]])}
    total = model.model.get_image_features(**inputs).pooler_output[0].shape[0]
    inputs["input_ids"] = torch.cat([ids[:at], torch.full((total,), free), ids[at + 1 :]])[None]
    seen = {}
    method = FlowCut(keep=info["target_num"])
    with vlmcompress.compress(model, method) as handle:
        hook = model.model.language_model.register_forward_pre_hook(
            lambda m, a, k: seen.update(embeds=k["inputs_embeds"]), with_kwargs=True
        )
        logits = model(**inputs).logits[0]
        hook.remove()
        vision = handle._wiring._local.visions["image"]
        last, tower = handle.last, vision.tower
        score = vision.state(method)["llm_scores"]
        new = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tower.ids.equal(tensors["out.keep_indices"])
    torch.testing.assert_close(seen["embeds"][0], tensors["out.inputs_embeds"], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(score[0], tensors["out.llm_score"], atol=1e-5, rtol=1e-4)
    image = last.samples[0].images[0]
    assert len(image.kept) == info["visual_tokens_entering_llm"]
    assert not image.is_newline[image.kept].any()
    kept = image.kept_at(2)
    assert torch.searchsorted(image.kept, kept).equal(tensors["out.llm_keep"])
    assert last.layer_tokens == [len(image.kept)] * 2 + [info["target_num"]] * 2
    assert last.frame_at(3).positions[0].tolist() == list(range(len(tensors["out.logits"])))
    length = inputs["input_ids"].shape[1]
    stays = torch.cat([torch.arange(at), at + kept, torch.arange(at + total, length)])
    torch.testing.assert_close(logits[stays], tensors["out.logits"], atol=1e-3, rtol=1e-3)
    assert new[0, length:].tolist() == tensors["out.generated"].tolist()


@pytest.mark.parametrize("path", cases("flowcut", kind=("functions",)), ids=lambda p: p.stem)
def test_functions(path):
    info, tensors = read(path)
    for case in info["cases"]:
        attention, similarity, value, score = (
            tensors[f"{case['id']}.{name}"] for name in ("in.cls_attn", "in.sem_attn", "in.value", "out.score")
        )
        ours = flow_score(attention, similarity, value_magnitude(value[:, None]))
        torch.testing.assert_close(ours, score, atol=1e-5, rtol=1e-4)
        n = torch.full((case["B"],), case["N"])
        amount = cut_sizes(entropy_ratio(shares(attention), n), n, torch.full_like(n, case["target_num"]), case["rpl"])
        assert round(float(amount.max())) == case["prune_num"]


def build_qwen(info, tensors):
    ids = {k: info[k] for k in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    rope = {"rope_type": "default", "rope_theta": info["text_config"]["rope_theta"]}
    text = {k: v for k, v in info["text_config"].items() if k not in ("rope_theta", "mrope_section")}
    text["rope_parameters"] = {**rope, "mrope_section": info["text_config"]["mrope_section"]}
    config = Qwen2VLConfig(vision_config=info["vision_config"], text_config=text, video_token_id=119, **ids)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.model.visual.load_state_dict(pick(tensors, "w.visual."))
    if any(k.startswith("w.model.") for k in tensors):
        model.model.language_model.load_state_dict(pick(tensors, "w.model."))
        model.lm_head.load_state_dict(pick(tensors, "w.lm_head."))
    return model


def qwen_prompt(info, tensors):
    grid = tensors["in.grid_thw"]
    if "in.input_ids" in tensors:
        ids = tensors["in.input_ids"]
    else:
        image = torch.full((int(grid.prod()) // 4,), info["image_token_id"])
        ids = torch.cat([torch.tensor([5, 121]), image, torch.tensor([122, 6])])[None]
    kinds = (ids == info["image_token_id"]).int()
    return {
        "input_ids": ids,
        "mm_token_type_ids": kinds,
        "pixel_values": tensors["in.pixel_values"],
        "image_grid_thw": grid,
    }


@pytest.mark.parametrize("path", cases("flowcut", kind=("qwen2vl_vit", "qwen2vl_end_to_end")), ids=lambda p: p.stem)
@torch.no_grad()
def test_qwen2_vl(path):
    info, tensors = read(path)
    model, inputs = build_qwen(info, tensors), qwen_prompt(info, tensors)
    seen = {}
    method = (
        FlowCut(keep=info["target_num"]) if "out.logits" in tensors else FlowCut(keep=info["target_num"], llm_layer=0)
    )
    with vlmcompress.compress(model, method) as handle:
        hook = model.model.visual.merger.register_forward_hook(lambda m, a, out: seen.update(merged=out))
        logits = model(**inputs).logits
        hook.remove()
        tower = handle._wiring._local.visions["image"].tower
        last = handle.last
        kept = last.samples[0].images[0].kept
        new = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert tower.ids[0].equal(tensors["out.keep_patch_indices"])
    assert last.tower_tokens == [row["patches_in"] for row in info["schedule"]]
    # released code: merged tokens take the first places, whatever their patches
    full = int(inputs["image_grid_thw"].prod()) // 4
    assert kept.tolist() == list(range(min(info["vit_target_patches"] // 4, full)))
    if "out.merged" in tensors:
        torch.testing.assert_close(seen["merged"], tensors["out.merged"], atol=2e-4, rtol=1e-4)
    if "out.logits" not in tensors:
        return
    length, start = inputs["input_ids"].shape[1], info["visual_start"]
    enters = torch.cat([torch.arange(start + len(kept)), torch.arange(start + full, length)])
    assert last.positions[-3:, 0].equal(tensors["in.position_ids"][:, 0, enters])
    kept = last.samples[0].images[0].kept_at(2)
    assert kept.equal(tensors["out.llm_keep"])
    stays = torch.cat([torch.arange(start), start + kept, torch.arange(start + full, length)])
    torch.testing.assert_close(logits[0, stays], tensors["out.logits"], atol=1e-3, rtol=1e-3)
    assert new[0, length:].tolist() == tensors["out.generated"].tolist()


@pytest.mark.parametrize("path", cases("flowcut", kind=("qwen_functions",)), ids=lambda p: p.stem)
def test_qwen_functions(path):
    info, tensors = read(path)
    for case in info["cases"]:
        attention, similarity, value = (tensors[f"{case['id']}.in.{name}"] for name in ("attn", "sem", "value"))
        magnitude = value_magnitude(value[None, None])
        vit, llm = tensors[f"{case['id']}.out.score_vit"], tensors[f"{case['id']}.out.score_llm"]
        torch.testing.assert_close(flow_score(attention, None, magnitude), vit, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(flow_score(attention, similarity, magnitude), llm, atol=1e-5, rtol=1e-4)
        n, target = torch.tensor([case["N"]]), torch.tensor([case["target_num"]])
        amount = cut_sizes(entropy_ratio(attention, n, 1e-7), n, target, case["rpl"])
        assert round(float(amount)) == case["prune_num"]
