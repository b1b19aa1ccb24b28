# SPDX-License-Identifier: Apache-2.0
"""GlobalCom² against numbers from the authors' code, through ``compress`` on the stock LLaVA-NeXT class.

The vectors give scores, not pixels. :func:`tower_for` builds a CLIP tower whose last layer yields any scores that the
pixels ask for, so that the whole path runs: tower, folded score, allocation, selection, packing, feeding order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from vectors import cases

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.ops.scores import folded_cls_logits
from vlmcompress.ops.tiles import combined_scores, crop_weights, enlarge, from_canvas, to_canvas

torch.set_num_threads(1)
IMAGE = 1


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def model_for(side: int, grids: list[list[int]], bound: float) -> LlavaNextForConditionalGeneration:
    """Stock model on views of side × side one-pixel patches.

    A pixel (c, s, 0) with c² + s² = 1 becomes √2 (c, -c, s, -s), which every layer norm leaves as it is; blocks add
    nothing; the last layer's CLS query meets it with the logit bound · c.
    """
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=4, intermediate_size=4, num_hidden_layers=2, num_attention_heads=2, image_size=side,
            patch_size=1, layer_norm_eps=1e-12,
        ),
        text_config=LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
            initializer_range=0.2,
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[side * h, side * w] for w, h in grids],
    )  # fmt: skip
    model = LlavaNextForConditionalGeneration(config).eval()
    tower = model.model.vision_tower
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.zero_()
        tower.embeddings.class_embedding.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
        weight = torch.zeros(4, 3)
        weight[0, 0], weight[1, 0], weight[2, 1], weight[3, 1] = 1, -1, 1, -1
        tower.embeddings.patch_embedding.weight.copy_(weight[..., None, None])
        for layer in tower.encoder.layers:
            for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
                linear.weight.zero_()
                linear.bias.zero_()
        attention = tower.encoder.layers[-1].self_attn
        for linear in (attention.q_proj, attention.k_proj):
            linear.weight.zero_()
            linear.bias.zero_()
        attention.q_proj.bias[0] = 1.0
        attention.k_proj.weight[0, 0] = 2 * bound
    return model


def pixels_for(scores: torch.Tensor, bound: float) -> torch.Tensor:
    """[V, 3, side, side] from scores [V, side²]."""
    side = round(scores.shape[1] ** 0.5)
    c = scores.double() / bound
    picture = torch.stack([c, (1 - c**2).sqrt(), torch.zeros_like(c)], 1)
    return picture.view(len(scores), 3, side, side).float()


class Setting:
    """A model and a prompt for images of given scores."""

    def __init__(self, scores: list[torch.Tensor], grids: list[list[int]], sizes_wh: list[list[int]], ids: list[int]):
        self.side = round(scores[0].shape[1] ** 0.5)
        bound = 1.01 * max(float(s.abs().max()) for s in scores)
        self.model = model_for(self.side, grids, bound)
        pixels = [pixels_for(s, bound) for s in scores]
        sizes = torch.tensor([[h, w] for w, h in sizes_wh])
        self.inputs = {"pixel_values": torch.nn.utils.rnn.pad_sequence(pixels, batch_first=True), "image_sizes": sizes}
        self.layout = adapter_for(self.model).geometry(self.inputs)
        lengths = iter(self.layout.n)
        row = [token for i in ids for token in ([IMAGE] * next(lengths) if i == -200 else [i])]
        self.inputs["input_ids"] = torch.tensor([row])
        with torch.no_grad():
            self.stock = self.model.model.get_image_features(
                **{k: self.inputs[k] for k in ("pixel_values", "image_sizes")}
            )

    @torch.no_grad()
    def run(self, **options):
        fed = {}
        with vlmcompress.compress(self.model, "globalcom2", **options) as handle:
            hook = self.model.model.language_model.register_forward_pre_hook(
                lambda m, a, k: fed.update(k), with_kwargs=True
            )
            self.model(**self.inputs)
            hook.remove()
        return handle, fed["inputs_embeds"][0], fed.get("position_ids")

    def fed_by(self, sequence: torch.Tensor, images: list[int]) -> torch.Tensor:
        """Embeddings of the official rows (kind, crop, y, x); ``images``: the image of every row."""
        embed, rows = self.model.get_input_embeddings().weight, []
        for (kind, crop, y, x), image in zip(sequence.tolist(), images, strict=True):
            packed = self.stock.pooler_output[image]
            if kind == 3:
                rows.append(embed[y])
            elif kind == 2:
                rows.append(self.model.model.image_newline)
            else:
                view = int((self.layout.view_image < image).sum()) + (crop + 1 if kind == 1 else 0)
                here = (self.layout.view[image] == view) & (self.layout.cell[image] == y * self.side + x)
                rows.append(packed[int(here.nonzero())])
        return torch.stack(rows)


def pipeline(path):
    info, tensors = load(path)
    scores = torch.cat([tensors["base_scores"][None], tensors["crop_scores"]]).float()
    setting = Setting([scores], [[info["grid_w"], info["grid_h"]]], [info["image_size_wh"]], [5, -200, 6])
    options = {"keep": info["retention_ratio"], "tau": info["temperature"]}
    return info, tensors, setting, options


def strict(yes: bool) -> list:
    """Cases of the whole pipeline; those in half precision are not strict, since their scores have ties."""
    paths = cases("globalcom2", kind=("pipeline",))
    return [p for p in paths if not isinstance(p, Path) or json.loads(p.read_text())["strict"] == yes]


@pytest.mark.parametrize("path", strict(True), ids=lambda p: p.stem)
def test_allocation_and_scores(path):
    info, tensors, setting, options = pipeline(path)
    layout, side = setting.layout, info["side"]
    grid, tiles = (side, side), (info["grid_h"], info["grid_w"])
    base, local = tensors["base_scores"].float(), tensors["crop_scores"].float()
    weights = crop_weights(base, grid, tiles, info["temperature"])
    ratios = (options["keep"] * weights).clamp_max(1.0)
    torch.testing.assert_close(ratios, tensors["ratios"], atol=1e-12, rtol=0)

    present = layout.to_views(layout.patch, fill=False)[1:]
    assert present.equal(tensors["unpad_mask"].bool())
    assert layout.grid[0] == (info["unpadded_h"], info["unpadded_w"])
    assert layout.n[0] == info["hf_len_full"]
    cells = present.view(-1, side, side)
    dims = torch.stack([cells.any(1).sum(1), cells.any(2).sum(1)], 1)
    assert dims.equal(tensors["crop_dims_wh"])

    picture = to_canvas(present, tiles, grid)
    enlarged = enlarge(base, grid, layout.grid[0])
    spread = from_canvas(torch.zeros(picture.shape).masked_scatter(picture, enlarged), tiles, grid)
    torch.testing.assert_close(spread[present], tensors["global_scores_flat"].float(), atol=1e-5, rtol=0)
    combined = combined_scores(local, spread, present)
    torch.testing.assert_close(combined[present], tensors["combined_scores_flat"].float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", strict(True), ids=lambda p: p.stem)
def test_kept_tokens(path):
    info, tensors, setting, options = pipeline(path)
    handle, _, positions = setting.run(**options)
    kept = handle.last.samples[0].images[0].kept
    if options["keep"] == 1.0:
        assert len(kept) == info["hf_len_full"]
    elif len(tensors["hf_keep_flat"]) == info["unpadded_h"]:  # where the code keeps newlines alone, one patch stays
        best = tensors["base_scores"].argmax()[None]
        assert kept.equal(torch.cat([best, tensors["hf_keep_flat"]]))
    else:
        assert kept.equal(tensors["hf_keep_flat"])
        assert positions.flatten().tolist() == list(range(len(kept) + 2))
    handle, _, _ = setting.run(layout="official", **options)
    assert handle.last.samples[0].images[0].kept.unique().equal(tensors["hf_keep_flat"])
    views = torch.bincount(
        setting.layout.view[0][tensors["hf_keep_flat"]].clamp_min(-1) + 1, minlength=2 + len(tensors["crop_k"])
    )
    assert views[2:].tolist() == tensors["crop_k"].tolist()


@pytest.mark.parametrize("path", strict(False), ids=lambda p: p.stem)
def test_half_precision_scores_choose_nearly_the_same(path):
    """Officially these are ranked as they are, ties and all; ours are compared in fp32."""
    _, tensors, setting, options = pipeline(path)
    handle, _, _ = setting.run(**options)
    kept, official = handle.last.samples[0].images[0].kept.tolist(), tensors["hf_keep_flat"].tolist()
    assert len(set(kept) & set(official)) >= 0.95 * max(len(kept), len(official))


@pytest.mark.parametrize("path", strict(True), ids=lambda p: p.stem)
def test_official_sequence(path):
    info, tensors, setting, options = pipeline(path)
    handle, fed, positions = setting.run(layout="official", **options)
    sequence = tensors["official_sequence"].long()
    expected = setting.fed_by(sequence, [0] * len(sequence))
    torch.testing.assert_close(fed[1:-1], expected, atol=1e-5, rtol=1e-5)
    assert positions.flatten().tolist() == list(range(info["official_len"] + 2))
    assert len(handle.last.samples[0].images[0].kept) == info["official_len"]
    first = handle.last.selection.keep[0, : len(tensors["thumb_keep_ordered"])]
    assert first.equal(tensors["thumb_keep_ordered"])


@pytest.mark.parametrize("path", cases("globalcom2", kind=("e2e",)), ids=lambda p: p.stem)
def test_whole_prompt(path):
    info, tensors = load(path)
    counts = tensors["crops_per_image"].tolist()
    scores = list(tensors["scores"].split(counts))
    setting = Setting(scores, info["grids_wh"], info["image_sizes_wh"], tensors["input_ids"].tolist())
    _, fed, positions = setting.run(layout="official", keep=info["retention_ratio"], tau=info["temperature"])
    sequence = tensors["official_sequence"].long()
    torch.testing.assert_close(fed, setting.fed_by(sequence, [0] * len(sequence)), atol=1e-5, rtol=1e-5)
    assert positions.flatten().tolist() == list(range(info["official_len"]))


@pytest.mark.parametrize("path", cases("globalcom2", kind=("known_bug",)), ids=lambda p: p.stem)
def test_every_image_by_its_own_scores(path):
    """Where the official code is wrong for all images but the first, each gets what it would get alone."""
    info, tensors = load(path)
    counts = tensors["crops_per_image"].tolist()
    ids = tensors["input_ids"].tolist()
    setting = Setting(list(tensors["scores"].split(counts)), info["grids_wh"], info["image_sizes_wh"], ids)
    _, fed, _ = setting.run(layout="official", keep=info["retention_ratio"], tau=info["temperature"])
    alone = [tensors[f"alone_sequence_{i}"].long()[1:] for i in range(len(counts))]
    rows, owners = [], []
    pending = iter(range(len(counts)))
    for i in ids:
        image = next(pending) if i == -200 else 0
        part = alone[image] if i == -200 else torch.tensor([[3, -1, i, -1]])
        rows.append(part)
        owners += [image] * len(part)
    torch.testing.assert_close(fed, setting.fed_by(torch.cat(rows), owners), atol=1e-5, rtol=1e-5)


def last_layer(tensors: dict, info: dict) -> LlavaNextForConditionalGeneration:
    width = info["num_heads"] * info["head_dim"]
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=info["num_heads"],
        image_size=4, patch_size=1, layer_norm_eps=info["layer_norm_eps"],
    )  # fmt: skip
    text = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=16)
    model = LlavaNextForConditionalGeneration(
        LlavaNextConfig(vision_config=config, text_config=text, image_token_index=IMAGE, image_grid_pinpoints=[[8, 8]])
    ).eval()
    layer = model.model.vision_tower.encoder.layers[-1]
    weights = {k.removeprefix("layer."): v for k, v in tensors.items() if k.startswith("layer.")}
    assert not layer.load_state_dict(weights, strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("path", cases("globalcom2", kind=("attention",)), ids=lambda p: p.stem)
@pytest.mark.parametrize("folded", [True, False])
def test_score_of_the_last_layer(path, folded):
    """Through ``compress``: a forward hook puts the case's hidden states between the two layers."""
    info, tensors = load(path)
    model = last_layer(tensors, info)
    attention = model.model.vision_tower.encoder.layers[-1].self_attn
    norm = model.model.vision_tower.encoder.layers[-1].layer_norm1
    x = norm(tensors["hidden_minus2"])
    q, k = attention.q_proj, attention.k_proj
    rows = folded_cls_logits(x, q.weight, q.bias, k.weight, k.bias, info["num_heads"], info["head_dim"] ** -0.5)
    torch.testing.assert_close(rows, tensors["expected_cls_scores"], atol=1e-5, rtol=0)
    if not folded:  # as an adapted or quantised projection, which cannot be folded
        for name in ("q_proj", "k_proj"):
            setattr(attention, name, torch.nn.Sequential(getattr(attention, name)))
    first = model.model.vision_tower.encoder.layers[0]
    handle = vlmcompress.compress(model, "globalcom2", keep=0.5)
    given = {"pixel_values": torch.zeros(1, 5, 3, 4, 4), "image_sizes": torch.tensor([[8, 8]])}
    layout = adapter_for(model).geometry(given)
    ids = torch.full((1, 1 + layout.n[0]), IMAGE)
    ids[0, 0] = 5
    first.register_forward_pre_hook(lambda m, a, kw: ((tensors["hidden_minus2"], *a[1:]), kw), with_kwargs=True)
    with torch.no_grad():
        for linear in (first.self_attn.out_proj, first.mlp.fc2):
            linear.weight.zero_()
            linear.bias.zero_()
        model(input_ids=ids, **given)
    scores = layout.to_views(handle.last.samples[0].images[0].scores()[None])
    expected = tensors["expected_cls_scores"]
    torch.testing.assert_close(scores[0], expected[0] / expected[0].norm(), atol=1e-5, rtol=0)
    present = torch.ones_like(expected[1:], dtype=torch.bool)
    spread = from_canvas(enlarge(expected[0], (4, 4), (8, 8)).view(8, 8), (2, 2), (4, 4))
    torch.testing.assert_close(scores[1:], combined_scores(expected[1:], spread, present), atol=1e-5, rtol=0)
