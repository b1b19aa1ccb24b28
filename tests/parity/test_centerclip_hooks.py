# SPDX-License-Identifier: Apache-2.0
"""CenterCLIP through ``vlmcompress.compress`` against the authors' numbers, in towers of transformers and of open_clip.

The first block of the tower is an identity and is handed the reference's tokens; what reaches the second is compared.
"""

from __future__ import annotations

import json
import math

import models_encoders
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vectors import cases

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.methods.centerclip import CenterClip

NAMES = {"kmediods++": "kmedoids", "pooling": "pooling", "sparse_sampling": "sampling", "spectral": "spectral"}
BUILDERS = {"clip": models_encoders.clip, "open_clip": models_encoders.open_clip_tower}


def of(where) -> list:
    return [p for p in cases("centerclip") if not hasattr(p, "read_text") or where(json.loads(p.read_text()))]


def load(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


@torch.no_grad()
def through(build, x: torch.Tensor, **options):
    """What the method makes of ``x`` [V, 1 + n, C] in front of block 1, and the record of the pass."""
    side = math.isqrt(x.shape[1] - 1) * models_encoders.PATCH
    model = build(side, x.shape[2], 3, 2)
    adapter = adapter_for(model)
    first, second = adapter.tower_layers[:2]
    for name, module in first.named_modules():
        if name.rsplit(".", 1)[-1] in ("out_proj", "fc2", "c_proj"):
            nn.init.zeros_(module.weight), nn.init.zeros_(module.bias)
    first.register_forward_pre_hook(lambda block, args: (x, *args[1:]))
    seen = []
    with vlmcompress.compress(model, "centerclip", block=1, **options) as handle:
        second.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
        adapter.embed(torch.zeros(len(x), 3, side, side))
        return seen[0], handle.last


def with_cls(x: torch.Tensor, frames: int) -> torch.Tensor:
    """Segments [S, frames · n, C] as frames with a CLS token of zeros, [S · frames, 1 + n, C]."""
    return nn.functional.pad(x.reshape(len(x) * frames, -1, x.shape[-1]), (0, 0, 1, 0))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("path", of(lambda c: "kwargs" in c))
def test_k_medoids(path, build):
    case, tensors = load(path)
    x, kwargs, k = tensors["x"], case["kwargs"], case["K"]
    frames = x.shape[1] // (196 if x.shape[1] % 196 == 0 else 49)
    hidden, record = through(
        build, with_cls(x, frames), keep=k, frames=frames, metric=kwargs["distance"], p=kwargs["norm_p"],
        pre_norm=kwargs["pre_norm"], iterations=kwargs["iter_limit"], threshold=kwargs["threshold"],
    )  # fmt: skip
    agreed = torch.tensor(case["float64_restatement_agrees_per_item"])
    medoids = tensors["medoids"].sort(dim=1).values  # the method never feeds them unsorted
    expected = x.gather(1, medoids[..., None].expand(-1, -1, x.shape[-1]))
    assert hidden[agreed, 1:].equal(expected[agreed])
    kept = torch.stack([sample.images[0].kept for sample in record.samples])
    assert kept[agreed].equal(medoids[agreed])


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("path", of(lambda c: "degenerate" in c["what"]))
def test_one_cluster_and_all(path, build):
    _, tensors = load(path)
    for k in (1, 12):
        _, record = through(build, with_cls(tensors["x"], 3), keep=k, frames=3)
        kept = torch.stack([sample.images[0].kept for sample in record.samples])
        assert kept.equal(tensors[f"medoids_K{k}"])


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("path", of(lambda c: c.get("function") == "batch_spectral_clustering"))
def test_spectral(path, build):
    case, tensors = load(path)
    graph = "heat" if "Heat" in case["what"] else "knn"
    _, record = through(
        build, with_cls(tensors["x"], 2), keep=case["K"], frames=2, algorithm="spectral", graph=graph,
        neighbours=case["knn_k"],
    )  # fmt: skip
    kept = torch.stack([sample.images[0].kept for sample in record.samples])
    assert kept.equal(tensors["medoids64"])


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("path", of(lambda c: "config" in c and "shift" not in c["config"]["algorithm"]))
def test_module(path, build):
    case, tensors = load(path)
    config, x = case["config"], tensors["x_LND"].transpose(0, 1).contiguous()
    hidden, record = through(
        build, x, keep=config["cluster_num"], frames=config["before_block_frames"], segments=config["after_block_frames"],
        algorithm=NAMES[config["algorithm"]], aggregation=config.get("aggregation") or "medoid",
    )  # fmt: skip
    torch.testing.assert_close(hidden, tensors["y_LND"].transpose(0, 1), atol=2e-6, rtol=0)
    assert record.layer_views[1] == len(hidden)


@pytest.mark.parametrize("path", of(lambda c: "schedules" in c))
def test_schedules(path):
    case, _ = load(path)
    for plan in case["schedules"]:
        lists = plan["cluster_num_blocks"], plan["target_frames_blocks"], plan["max_frames"]
        if not plan["events"]:
            with pytest.raises(ValueError, match="never shorten"):
                CenterClip.from_blocks(*lists)
        elif plan["events"][0]["block_1based"] == 1:
            with pytest.raises(ValueError, match="whole numbers from 1"):
                CenterClip.from_blocks(*lists)
        else:
            stages = [(e["block_1based"] - 1, e["frames"][1], e["tokens"][1]) for e in plan["events"]]
            assert list(CenterClip.from_blocks(*lists).schedule) == stages
