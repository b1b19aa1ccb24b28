# SPDX-License-Identifier: Apache-2.0
"""CenterCLIP's clustering, segments, baselines and schedules against the authors' numbers."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from vectors import cases

from vlmcompress.ops.cluster import affinity, distances, k_medoids, space_time_window, spectral_medoids, spectrum
from vlmcompress.ops.segments import events_of, join_segments, shift_channels

PATHS = cases("centerclip")
NAMES = {"kmediods++": "kmedoids", "pooling": "pooling", "sparse_sampling": "sampling", "spectral": "spectral"}


def of(where) -> list:
    return [p for p in PATHS if not hasattr(p, "read_text") or where(json.loads(p.read_text()))]


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def cost(x, medoids, assign, p):
    distance = distances(x, p=p)
    centre = medoids.gather(1, assign)
    return distance.gather(2, centre[..., None]).sum((1, 2))


@pytest.mark.parametrize("path", of(lambda c: "kwargs" in c))
def test_k_medoids(path):
    case, tensors = load(path)
    kwargs = case["kwargs"]
    x, metric, p = tensors["x"], kwargs["distance"], kwargs["norm_p"]
    options = {"metric": metric, "p": p, "pre_norm": kwargs["pre_norm"], "iterations": kwargs["iter_limit"],
               "id_sort": kwargs["id_sort"]}  # fmt: skip
    found = k_medoids(x, case["K"], threshold=kwargs["threshold"], **options)
    agreed = torch.tensor(case["float64_restatement_agrees_per_item"])
    for name, mine in (("kkz", found.seeds), ("medoids", found.medoids), ("assign", found.assign)):
        assert mine[agreed].equal(tensors[name][agreed]), name
    if metric == "euclidean" and not kwargs["pre_norm"]:
        official = cost(x, tensors["medoids_asis"], tensors["assign_asis"], p)
        torch.testing.assert_close(cost(x, found.medoids, found.assign, p), official, rtol=1e-2, atol=0)
    alone = k_medoids(x[1:2], case["K"], **options)
    assert alone.medoids.equal(found.medoids[1:2])
    fixed = k_medoids(x, case["K"], threshold=None, **{**options, "iterations": min(8, options["iterations"])})
    assert fixed.medoids.equal(found.medoids)


@pytest.mark.parametrize("path", of(lambda c: "degenerate" in c["what"]))
def test_one_cluster_and_all(path):
    _, tensors = load(path)
    for k in (1, 12):
        found = k_medoids(tensors["x"], k)
        assert found.medoids.equal(tensors[f"medoids_K{k}"]) and found.assign.equal(tensors[f"assign_K{k}"])


@pytest.mark.parametrize("path", of(lambda c: c.get("function") == "batch_spectral_clustering"))
def test_spectral(path):
    case, tensors = load(path)
    x, k = tensors["x"], case["K"]
    options = {"graph": "heat" if "Heat" in case["what"] else "knn", "neighbours": case["knn_k"]}
    weight = affinity(x, **options)
    torch.testing.assert_close(weight, tensors["W"], atol=1e-4, rtol=0)
    found = spectrum(weight, k)
    torch.testing.assert_close(found.eigenvalues.float(), tensors["eigenvalues64"], atol=1e-5, rtol=0)
    embedding, official = found.embedding.float(), tensors["Q64"]
    torch.testing.assert_close(embedding @ embedding.mT, official @ official.mT, atol=1e-4, rtol=0)
    clusters, agreed = spectral_medoids(x, k, **options), torch.tensor(case["exact_run_equals_float64"])
    assert clusters.medoids.equal(tensors["medoids64"]) and clusters.assign.equal(tensors["assign64"])
    assert clusters.medoids[agreed].equal(tensors["medoids"][agreed])


@pytest.mark.parametrize("path", of(lambda c: "config" in c))
def test_module(path):
    case, tensors = load(path)
    config, x = case["config"], tensors["x_LND"].transpose(0, 1).contiguous()
    if "shift" in config["algorithm"]:
        y = shift_channels(x, config["original_frame"], cls=config["algorithm"] == "token_shift")
    else:
        joined = join_segments(
            x, config["before_block_frames"], config["after_block_frames"], config["cluster_num"],
            algorithm=NAMES[config["algorithm"]], aggregation=config.get("aggregation") or "medoid",
        )  # fmt: skip
        y = joined.hidden
        if joined.clusters is not None:
            for name, mine in (("medoids", joined.clusters.medoids), ("assign", joined.clusters.assign)):
                by_segment = mine.view(-1, config["after_block_frames"], mine.shape[-1]).transpose(0, 1).flatten(0, 1)
                assert by_segment.equal(tensors[f"{name}_segment_major"])
    torch.testing.assert_close(y.transpose(0, 1), tensors["y_LND"], atol=2e-6, rtol=0)


@pytest.mark.parametrize("path", of(lambda c: "schedules" in c))
def test_schedules(path):
    case, tensors = load(path)
    for plan in case["schedules"]:
        events = events_of(plan["cluster_num_blocks"], plan["target_frames_blocks"], plan["max_frames"])
        assert plan["events"] == [
            {
                "block_1based": event.block + 1,
                "frames": list(event.frames),
                "tokens": list(event.tokens),
                "frame_duration": event.duration,
                "knn_k": event.neighbours,
            }
            for event in events
        ]
    window = space_time_window(3, 4, 4, space=3, time=3)
    assert window.equal(tensors["spatial_temporal_graph_T3_4x4_s3_t3"].bool())
