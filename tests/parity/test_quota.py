# SPDX-License-Identifier: Apache-2.0
"""QuoTA's budgets, grids and resizing against the authors' numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from vectors import cases

import vlmcompress
from vlmcompress.ops.frames import (
    cap_once,
    filled_grids,
    frame_weights,
    grid_of,
    merge_down,
    resize_frame,
    sampled_frames,
    split_budget,
    truncated_budget,
    with_newlines,
)

PATHS = cases("quota")


def of(where) -> list:
    return [p for p in PATHS if not hasattr(p, "read_text") or where(json.loads(p.read_text()))]


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


@pytest.mark.parametrize("path", of(lambda c: "counts_before_grid" in c and "version" in c))
def test_resized_frames(path):
    case, tensors = load(path)
    features, version = tensors["features"], case["version"]
    side = math.isqrt(features.shape[1])
    weights = frame_weights(tensors["p"])
    if version != "v1":
        weights = cap_once(weights, features.shape[1] / case["budget"])
    counts = truncated_budget(weights, case["budget"])
    assert counts == case["counts_before_grid"]
    kept = [i for i, count in enumerate(counts) if count > 0]
    assert kept == case["kept_frames"]
    if version in ("v1", "v2", "v5"):
        assert [list(grid_of(counts[i])) for i in kept] == case["grids_h_w"]
    rows = [resize_frame(features[i].view(side, side, -1), counts[i], version) for i in kept]
    torch.testing.assert_close(torch.cat(rows), tensors["out_flat"], atol=1e-5, rtol=0)
    if "out_with_newlines" in tensors:
        newline = tensors["image_newline"]
        lines = [with_newlines(row, grid_of(counts[i]), newline) for row, i in zip(rows, kept, strict=True)]
        torch.testing.assert_close(torch.cat(lines), tensors["out_with_newlines"], atol=1e-5, rtol=0)


def onevision(side: int, width: int) -> LlavaOnevisionForConditionalGeneration:
    """Stock model on frames of side × side one-pixel patches, with a text model as wide as the features of a case."""
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, image_size=side, patch_size=1,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
            vocab_size=16,
        ),
        image_token_index=1, video_token_index=2, vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config).eval()


@pytest.mark.parametrize("path", of(lambda c: c.get("version") in ("v1", "v2", "v3", "v5") and "budget" in c))
@torch.no_grad()
def test_what_a_stock_model_is_fed(path):
    """Through ``compress``: the case's features stand where the projector answers, in front of the model's own pooling."""
    case, tensors = load(path)
    features, expected = tensors["features"], tensors["out_flat"]
    side, frames = math.isqrt(features.shape[1]), len(features)
    model = onevision(side, features.shape[2])
    model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: features)
    pooled = math.ceil(side / 2) ** 2
    ids = torch.tensor([[5, *[2] * (frames * pooled + 1), 6]])
    pixels = torch.zeros(1, frames, 3, side, side)
    cap = None if case["version"] == "v1" else "grid"
    options = dict(scores=(tensors["p"].tolist(),), version=case["version"], rounding="truncate", cap=cap)
    seen = []
    with vlmcompress.compress(model, "quota", keep=case["budget"], **options) as handle:
        model.model.language_model.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        model(input_ids=ids, pixel_values_videos=pixels)
        kept = handle.last.samples[0].images[0].kept
    torch.testing.assert_close(seen[0][0, 1:-2], expected, atol=1e-5, rtol=0)
    assert seen[0][0, -2].equal(model.model.image_newline)
    assert len(kept) == case["tokens_out"] + 1 and (kept.diff() > 0).all()


@pytest.mark.parametrize("path", of(lambda c: "scale_weights" in c["what"]))
def test_the_pass_over_capped_shares(path):
    case, tensors = load(path)
    for row in case["rows"]:
        found = cap_once(tensors[f"in_{row['j']}"], row["cap"])
        torch.testing.assert_close(found, tensors[f"out_{row['j']}"], atol=1e-15, rtol=0)


@pytest.mark.parametrize("path", of(lambda c: "edge" in c))
def test_grids_and_sampler(path):
    case, _ = load(path)
    for count, grid in case["edge"]["grid rule for counts 1..40"].items():
        assert list(grid_of(int(count))) == grid
    for row in case["sampler (base 96, extra 64 per hour)"]:
        index = sampled_frames(row["total_frames"], row["duration"])
        assert len(index) == row["T"] and len(index) - len(index.unique()) == row["duplicates"]
        assert index[:4].tolist() == row["first"] and index[-3:].tolist() == row["last"]
    assert truncated_budget(frame_weights(torch.full((400,), 0.5)), 196) == [0] * 400


# ours -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("budget", "cap"), [(1568, None), (1568, 196), (1568, 100), (37, 4), (12544, 729), (0, 9)])
def test_nothing_is_lost_to_rounding(budget, cap):
    p = torch.rand(12, generator=torch.Generator().manual_seed(budget)) ** 6
    counts = split_budget(frame_weights(p), budget, cap)
    assert sum(counts) == (budget if cap is None else min(budget, 12 * cap))
    assert cap is None or max(counts) <= cap
    assert split_budget(frame_weights(p / 3), budget, cap) == counts
    ordered = [counts[i] for i in p.argsort()]
    assert ordered == sorted(ordered)
    grids = filled_grids(counts, cap)
    spent, plain = (sum(h * w for h, w in g) for g in (grids, [grid_of(c) for c in counts]))
    assert plain <= spent <= sum(counts)
    assert all((h * w == 0) == (count == 0) for (h, w), count in zip(grids, counts, strict=True))


def test_scores_without_meaning_share_evenly():
    for p in (torch.zeros(4), torch.full((4,), float("nan"))):
        assert split_budget(frame_weights(p), 10) == [3, 3, 2, 2]
    assert frame_weights(torch.tensor([0.5, float("nan"), 0.5])).tolist() == [0.5, 0.0, 0.5]
    assert split_budget(frame_weights(torch.full((400,), 0.5)), 196) == [1] * 196 + [0] * 204


def test_merging_by_hand():
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 4.0], [3.0, 0.0], [1.0, 1.0]]])
    # even: 1st is all like the 4th, 3rd all like the 2nd, 5th half like either
    assert merge_down(x, 3).tolist() == [[[1.0, 1.0], [0.0, 3.0], [2.0, 0.0]]]
    assert merge_down(x, 4).tolist() == [[[0.0, 4.0], [1.0, 1.0], [0.0, 2.0], [2.0, 0.0]]]
    assert merge_down(x, 9).equal(x)


def test_merging_inside_rows_and_columns():
    frame = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0))
    found = resize_frame(frame, 7, "v5")
    assert found.shape == (6, 3)  # three rows of two
    rows = torch.stack([merge_down(frame[i : i + 1], 2)[0] for i in range(4)])
    columns = torch.stack([merge_down(rows[None, :, j], 3)[0] for j in range(2)], 1)
    torch.testing.assert_close(found, columns.flatten(0, 1))


def test_bad_input():
    frame = torch.zeros(2, 2, 1)
    with pytest.raises(ValueError, match="version is one of"):
        resize_frame(frame, 2, "v6")
    with pytest.raises(ValueError, match="at least one token"):
        resize_frame(frame, 0)
