# SPDX-License-Identifier: Apache-2.0
"""The retrieval benchmark and the speed of image encoders, on models of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import models_encoders
import pytest
import timm
import torch

from vlmcompress.commands.bench_encoders import bench_encoders
from vlmcompress.commands.retrieval import retrieval
from vlmcompress.eval import encoders
from vlmcompress.eval.retrieval import ROWS, load
from vlmcompress.eval.rows import parse_row
from vlmcompress.method import create
from vlmcompress.ops.cluster import distances, k_medoids
from vlmcompress.training.tiny_clip import ClipRecipe, build_clip, save

BASE = Path(__file__).parents[2] / "assets" / "models" / "tiny-llava"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("clip")
    save(build_clip(BASE, ClipRecipe()), found)
    return str(found)


def test_the_command(folder, tmp_path):
    out = tmp_path / "deep" / "retrieval.json"
    retrieval(folder, ["centerclip segments=2 keep=16", "tome keep=16"], 12, out)
    report = json.loads(out.read_text())
    plain, clustered, merged = report["rows"]
    assert plain["method"] == "none" and plain["flops_share"] == 1.0 and plain["tokens_per_video"] is None
    assert clustered["tokens_per_video"] == 32 and clustered["flops_share"] < merged["flops_share"] < 1
    for row in report["rows"]:
        assert row["videos"] == 12
        for recall in row["recall"].values():
            assert 0 <= recall["low"] <= recall["value"] <= recall["high"] <= 100
    again = retrieval(folder, ["tome keep=16"], 12, tmp_path / "again.json")
    assert again["rows"][0]["recall"] == plain["recall"] and again["rows"][1]["recall"] == merged["recall"]


def test_the_default_rows_can_be_built():
    rows = [parse_row(text) for text in ROWS]
    assert len({row.key for row in rows}) == len(rows) and rows[0].method == "none"


def test_bad_input(folder, tmp_path):
    for said, call in (
        ("no open_clip model", lambda: load(str(tmp_path))),
        ("at least two videos", lambda: retrieval(folder, [], 1, tmp_path / "x.json")),
        ("is a folder", lambda: retrieval(folder, [], 4, tmp_path)),
        ("no method 'magic'", lambda: retrieval(folder, ["magic"], 4, tmp_path / "x.json")),
        ("no language model behind", lambda: retrieval(folder, ["vtc-cls"], 4, tmp_path / "x.json")),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_the_cubic_formulation_finds_clusters_of_the_same_cost():
    x = torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(0))
    d = distances(x)

    def cost(medoids):
        return d.gather(1, medoids[..., None].expand(-1, -1, 40)).amin(1).sum(1)

    ours, theirs = k_medoids(x, 12), encoders.cubic_k_medoids(x, 12)
    torch.testing.assert_close(cost(theirs), cost(ours.medoids), rtol=0.02, atol=0)
    assert k_medoids(x, 1).medoids.equal(encoders.cubic_k_medoids(x, 1))


def test_towers_are_timed_with_their_flops():
    model = timm.create_model("test_vit", num_classes=3).eval()
    methods = {"uncompressed": None, "tome": create("tome", keep=25).methods[0]}
    ticks = []
    found = encoders.towers(model, torch.randn(2, 3, 160, 160), methods, 2, "cpu", lambda: ticks.append(1))
    assert found["uncompressed"]["speedup"] == 1.0 and found["tome"]["flops_share"] < 1
    assert found["tome"]["ms"]["runs"] == 2 and len(ticks) == 6


def test_the_speed_command(tmp_path):
    shape = encoders.Shape(
        4, 2, 9, 36, 32, 48, 2, 2, video_tower=models_encoders.open_clip_tower, image_tower=models_encoders.timm_tower
    )
    report = bench_encoders(tmp_path, 2, "cpu", shape)
    (path,) = tmp_path.glob("bench-encoders-*.json")
    assert json.loads(path.read_text()) == report
    clusters = report["clustering"]
    assert clusters["speedup"] > 0 and 0.5 < clusters["same_medoids"] <= 1
    # [B, K, N, N] against [B, N, N]
    assert clusters["peak_bytes"]["released"] > 2 * clusters["peak_bytes"]["ours"]
    assert set(report["video"]) == {"uncompressed", "k-medoids", "k-medoids, 3 rounds", "sampling"}
    assert report["video"]["k-medoids"]["flops_share"] > report["video"]["sampling"]["flops_share"]
    assert report["images"]["uncompressed"]["speedup"] == 1.0
