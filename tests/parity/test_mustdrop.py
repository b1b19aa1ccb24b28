# SPDX-License-Identifier: Apache-2.0
"""MustDrop against numbers from the authors' code, through ``compress`` on the stock LLaVA class."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from inside_llava import build, feed, greedy, inputs, load_text, text_config
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from vectors import cases

import vlmcompress
from vlmcompress.method import Stage
from vlmcompress.methods.mustdrop import MustDrop
from vlmcompress.ops.windows import merge_windows, window_cells, window_similarity

CLOSE = dict(atol=1e-4, rtol=1e-4)


@dataclass(frozen=True, eq=False)
class Recorder(MustDrop):
    """Takes note of the text's attention; with ``embeddings`` it feeds those and takes ``keys`` for the key set."""

    embeddings: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    seen: list = field(default_factory=list)

    stages: ClassVar[frozenset[Stage]] = MustDrop.stages | {Stage.ENTRY}

    def options(self):
        return {}

    def tower(self, layer, state):
        if self.keys is None:
            return super().tower(layer, state)
        state["key"] = torch.zeros(layer.ids.shape, dtype=torch.bool).index_fill(1, self.keys, True)
        return None

    def entry(self, tokens, state):
        return None if self.embeddings is None else feed(self.embeddings)

    def prefill(self, layer, state):
        rows = layer.instruction_rows()
        attention = layer.attention(rows).mean(1)[0]
        slots, _ = layer.frame.slots()
        cut = super().prefill(layer, state)
        key = layer.layout.of_views(state["key"], fill=False).gather(1, layer.tokens())[0]
        self.seen.append((attention[:, slots[0]], key.nonzero()[:, 0]))
        return cut


def check_language_model(recorder, final, handle, info, tensors, logits, cached, close):
    layout, hyper = info["layout"], info["hyper"]
    start = layout["image_start"]
    image = handle.last.samples[0].images[0]
    order = handle.last.frames[0].index[0][handle.last.frames[0].visual[0]] - start  # feeding order
    for stage, (layer, (attention, key)) in enumerate(
        zip(hyper["prune_after_layers_0based"], recorder.seen, strict=True), 1
    ):
        kept = image.kept_at(layer + 1)
        torch.testing.assert_close(kept, order[tensors[f"stage{stage}.kept_global"]].sort().values)
        torch.testing.assert_close(key, tensors[f"stage{stage}.key_set_in"].sort().values)
        torch.testing.assert_close(attention, tensors[f"stage{stage}.attn_text_img"], atol=5e-5, rtol=0)
    assert handle.last.cache_lengths == info["kv_lens_after_eviction"]
    after = [*handle.last.layer_tokens[1:], handle.last.layer_tokens[-1]]
    crops = layout.get("crops", layout.get("images", 1))
    assert sum(after) / len(after) / crops == pytest.approx(info["avg_visual_tokens"])
    for layer, keys in cached.items():
        torch.testing.assert_close(keys, tensors[f"cache_after_evict.{layer}.k"], **close)
    frame = handle.last.frames[-1].index[0]
    torch.testing.assert_close(final[0, frame], tensors["final_hidden"][0], **close)
    finite = tensors["gen_logits"].isfinite()
    torch.testing.assert_close(logits[finite], tensors["gen_logits"][finite], **close)


def run(model, method, given, tensors, info, close=CLOSE):
    with torch.no_grad(), vlmcompress.compress(model, method) as handle:
        final = model.model(**given).last_hidden_state
        method.seen.clear()
        first = model(**given, use_cache=True)
        cache = first.past_key_values if "past_key_values" in first else first.cache
        cached = {layer: cache.layers[layer].keys.clone() for layer in (0, 2, 6, 10, 14, 15, 31)}
        logits = greedy(model, first, tensors["gen_tokens"])
        check_language_model(method, final, handle, info, tensors, logits, cached, close)


@pytest.mark.parametrize("path", cases("mustdrop", kind=("llm_from_embeds",)), ids=lambda p: p.stem)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_language_model_cases(path, attention):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    layout, hyper = info["layout"], info["hyper"]
    start, n = layout["image_start"], layout["n_image"]
    unused = set(range(info["config"]["vocab_size"])) - set(tensors["gen_tokens"].tolist())
    model = build(info["config"], tensors, n, min(unused))
    model.set_attn_implementation(attention)
    embeds = tensors["inputs_embeds"]
    method = Recorder(
        gamma=hyper["global_thr"], alpha=hyper["individual_thr"], layers=hyper["prune_after_layers_0based"],
        merge=False, official_decode=True, embeddings=embeds[0, start : start + n], keys=tensors["key_set"].flatten(),
    )  # fmt: skip
    close = dict(atol=1e-3, rtol=1e-3) if path.stem == "case_06" else CLOSE  # its weights are larger
    run(model, method, inputs(model, embeds, start, n), tensors, info, close)


def vision_model(tensors: dict, vision: dict, text: LlamaConfig, prefix: str, image: int, tiles: int = 0):
    """A LLaVA with the case's tower; with ``tiles`` a LLaVA-NeXT that cuts pictures into as many crops in a row."""
    parts = dict(
        vision_config=CLIPVisionConfig(**{k: v for k, v in vision.items() if k != "grid"}), text_config=text,
        image_token_id=image, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    if tiles:
        edge = vision["image_size"]
        config = LlavaNextConfig(**parts, image_grid_pinpoints=[[edge, tiles * edge]])
        model = LlavaNextForConditionalGeneration(config).eval()
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**parts)).eval()
    weights = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    missing, unexpected = model.model.vision_tower.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not missing
    return model


@pytest.mark.parametrize("path", cases("mustdrop", kind=("vision_tower",)), ids=lambda p: p.stem)
def test_vision_tower(path):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    text = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=32)
    model = vision_model(tensors, info["config"], text, "w.vision_model.", 1)
    hyper, pixels = info["hyper"], tensors["pixel_values"]
    grid = info["config"]["grid"]
    noted = {}

    class Tower(MustDrop):
        def tower(self, layer, state):
            edit = super().tower(layer, state)
            if layer.index == 0:
                noted["edit"], noted["ids"] = edit, edit.keep
                noted["similarity"] = window_similarity(layer.patches, window_cells((grid, grid), (3, 3)))
            else:
                noted["row"], noted["key"] = layer.cls_row(), state["key"].gather(1, layer.ids)
            return edit

    fed = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(lambda m, a: fed.append(a[0]))
    ids = torch.full((len(pixels), 2 + grid * grid), 1)
    ids[:, 0], ids[:, -1] = 5, 6
    method = Tower(similarity=hyper["sim_threshold"], key_rate=hyper["key_rate"], shared_merge=True)
    with torch.no_grad(), vlmcompress.compress(model, method) as handle:
        model(input_ids=ids, pixel_values=pixels)
        sources = handle.last.samples[0].images[0].sources
    hook.remove()
    merged, n = info["windows_merged"], info["tokens_after_merge"]
    torch.testing.assert_close(noted["similarity"], tensors["vis.window_similarity"], **CLOSE)
    centres = window_cells((grid, grid), (3, 3))[:, 4]
    torch.testing.assert_close(noted["ids"][:, :merged], centres[tensors["vis.merge_window_order"]])
    torch.testing.assert_close(noted["edit"].hidden, tensors["vis.layer0_merged"][:, 1:], **CLOSE)
    torch.testing.assert_close(noted["row"], tensors["vis.cls_attn_last"], **CLOSE)
    for view in range(len(pixels)):
        assert noted["key"][view].nonzero()[:, 0].tolist() == sorted(tensors["vis.key_set"][view].tolist())
    assert fed[0].shape[1] == n
    torch.testing.assert_close(fed[0].view(len(pixels), n, -1), tensors["vis.features"], **CLOSE)
    assert sorted(len(s) for s in sources) == [1] * (n - merged) + [9] * merged


@pytest.mark.parametrize("path", cases("mustdrop", kind=("function_window_merge",)), ids=lambda p: p.stem)
def test_window_merge(path):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    for number, spec in enumerate(info["specs"]):
        grid, window = (spec["grid"],) * 2, tuple(spec["window"])
        case = {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"t{number}.")}
        patches = case["x"][:, 1:]
        cells = window_cells(grid, window)
        torch.testing.assert_close(
            window_similarity(patches, cells), case["window_similarity"], atol=1e-5, rtol=0
        )  # fmt: skip
        merged = merge_windows(patches, grid, window, spec["threshold"], shared=True)
        if not spec["windows_merged"]:
            assert merged is None
            continue
        torch.testing.assert_close(merged.hidden, case["merged"][:, 1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged.size, case["size"][:, 1:, 0])
        r = spec["windows_merged"]
        torch.testing.assert_close(merged.keep[:, r:], case["unmerged_idx"])
        windows = case["merge_window_order"]
        assert (merged.keep[:, :r, None] == cells[windows]).any(-1).all()
        torch.testing.assert_close(
            merged.owner.gather(1, cells[windows].flatten(1)),
            torch.arange(r).repeat_interleave(cells.shape[1]).expand(len(patches), -1),
        )


@pytest.mark.parametrize("path", cases("mustdrop", kind=("end_to_end_vlm",)), ids=lambda p: p.stem)
def test_end_to_end(path):
    info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    llm, hyper = info["config"]["llm"], info["hyper"]
    unused = (
        set(range(llm["vocab_size"]))
        - set(tensors["gen_tokens"].tolist())
        - set(tensors["input_ids"].flatten().tolist())
    )
    image = min(unused)
    prefix = (
        "w.vision_tower.vision_model." if any("vision_tower.vision_model" in k for k in tensors) else "w.vision_tower."
    )
    crops = info["layout"]["crops"]
    model = vision_model(tensors, info["config"]["vision"], text_config(llm), prefix, image, tiles=crops - 1)
    load_text(model, tensors)
    projector = model.model.multi_modal_projector
    for old, linear in (("0", projector.linear_1), ("2", projector.linear_2)):
        linear.load_state_dict({part: tensors[f"w.model.mm_projector.{old}.{part}"] for part in ("weight", "bias")})
    ids = tensors["input_ids"].flatten()
    at = int((ids == -200).nonzero())
    vision = info["config"]["vision"]
    side = vision["image_size"] // vision["patch_size"]
    places, given = side * side, {"pixel_values": tensors["pixel_values"]}
    if crops > 1:  # the thumbnail, then one row of crops with a newline behind every row of patches
        places += side * (side * (crops - 1) + 1)
        given["image_sizes"] = torch.tensor([[vision["image_size"], vision["image_size"] * (crops - 1)]])
    given["input_ids"] = torch.cat([ids[:at], torch.full((places,), image), ids[at + 1 :]])[None]
    method = Recorder(
        gamma=hyper["global_thr"], alpha=hyper["individual_thr"], layers=hyper["prune_after_layers_0based"],
        similarity=hyper["sim_threshold"], key_rate=hyper["key_rate"], official_decode=True,
        shared_merge=True, official_flat=crops > 1,
    )  # fmt: skip
    run(model, method, given, tensors, info)
