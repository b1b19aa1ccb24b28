# SPDX-License-Identifier: Apache-2.0
"""The TokenFLEX projector against the reference numbers, and the facts about the released one."""

from __future__ import annotations

import json

import pytest
import torch
import vectors
from safetensors.torch import load_file

from vlmcompress.ops.pool import pool_grid, resize_pool_grid, target_grid
from vlmcompress.projectors.tokenflex import TokenFlexProjector

CLOSE = dict(atol=1e-5, rtol=0)
CASES = vectors.cases("tokenflex")


def read(path):
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def projector(tensors, pooling: str = "adaptive") -> TokenFlexProjector:
    weights = {k.removeprefix("w."): v for k, v in tensors.items() if k.startswith("w.")}
    hidden, d_vision = weights["gate.weight"].shape
    module = TokenFlexProjector(
        d_vision, len(weights["down.weight"]), pooling=pooling, hidden_ratio=hidden // d_vision,
        bias="gate.bias" in weights,
    )  # fmt: skip
    module.load_state_dict(weights)
    return module


@pytest.mark.parametrize("pooling", ["adaptive", "resize"])
@pytest.mark.parametrize("path", [p for p in CASES if not hasattr(p, "stem") or p.stem != "case_08"])
@torch.no_grad()
def test_outputs(path, pooling):
    case, tensors = read(path)
    module, grid = projector(tensors, pooling), tuple(case["grid"])
    rows = tensors["in.x"].unflatten(1, grid)
    pool = {"adaptive": pool_grid, "resize": resize_pool_grid}[pooling]
    for h, w in case["targets"]:
        torch.testing.assert_close(pool(rows, h, w), tensors[f"pool.{pooling}.{h}x{w}"], **CLOSE)
        out = module(tensors["in.x"], grid=grid, target=(h, w))
        torch.testing.assert_close(out, tensors[f"out.{pooling}.{h}x{w}"], **CLOSE)
        assert torch.allclose(pool_grid(rows, h, w), resize_pool_grid(rows, h, w), **CLOSE) == case["same"][f"{h}x{w}"]
        if grid[0] == grid[1]:
            module.num_image_tokens = h * w
            assert module(tensors["in.x"]).equal(out)


@pytest.mark.parametrize("path", [p for p in CASES if not hasattr(p, "stem") or p.stem == "case_08"])
def test_gradients(path):
    _, tensors = read(path)
    module, x = projector(tensors), tensors["in.x"].requires_grad_()
    cotangent = next(v for k, v in tensors.items() if "cotangent" in k)
    module(x, grid=(12, 12), target=(5, 5)).mul(cotangent).sum().backward()
    found = {"x": x.grad, **{k.removeprefix("mlp."): p.grad for k, p in module.named_parameters()}}
    wanted = {k.partition(".")[2].removeprefix("w.").removeprefix("in."): v for k, v in tensors.items()
              if k.startswith("grad.")}  # fmt: skip
    assert set(wanted) == set(found)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not vectors.folder("tokenflex").exists(), reason="reference vectors are not beside the project")
def test_parameter_counts():
    counts = json.loads((vectors.folder("tokenflex") / "parameters.json").read_text())
    sizes = {tuple(map(int, key.split("->"))): n for key, n in counts.items() if key[0].isdigit() and "*" not in key}
    assert len(sizes) >= 4
    for (d_vision, d_text), n in sizes.items():
        with torch.device("meta"):
            assert sum(p.numel() for p in TokenFlexProjector(d_vision, d_text).parameters()) == n


@pytest.mark.parametrize("prefix", ["projector.mlp.", "mlp.", ""])
@torch.no_grad()
def test_released_names_load(prefix):
    ours = TokenFlexProjector(8, 12, num_image_tokens=4)
    names = {"norm": "layernorm", "gate": "f1", "up": "f2", "down": "g"}
    released = {}
    for key, value in ours.state_dict().items():
        part, leaf = key.removeprefix("mlp.").split(".")
        released[f"{prefix}{names[part]}.{leaf}"] = value + 1
    fresh = TokenFlexProjector(8, 12)
    fresh.load_state_dict(released)
    assert all(fresh.state_dict()[k].equal(v + 1) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("width", [128, 1152])
@torch.no_grad()
def test_output_of_fresh_weights_does_not_vanish_in_narrow_models(width):
    torch.manual_seed(0)
    out = TokenFlexProjector(width, width)(torch.randn(2, 64, width))
    assert 0.09 < out.std() < 0.13


def test_windows_of_the_resize_pooling():
    """R and window of the specification's table for 27 × 27 patches, seen in which patches a token reads."""
    grid = torch.eye(27).view(1, 27, 27, 1).repeat(1, 1, 1, 1)
    for n, size in {1: 27, 2: 28, 3: 27, 8: 32, 12: 36, 16: 32, 27: 27}.items():
        up = torch.nn.functional.interpolate(
            grid.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", align_corners=True
        )
        expected = up.unfold(2, size // n, size // n).unfold(3, size // n, size // n).mean((-1, -2)).flatten(2).mT
        torch.testing.assert_close(resize_pool_grid(grid, n, n), expected)


@pytest.mark.parametrize(
    ("count", "grid", "target"),
    [(144, (24, 24), (12, 12)), (1, (24, 24), (1, 1)), (1024, (24, 24), (32, 32)), (96, (16, 24), (8, 12)),
     (24, (16, 24), (4, 6)), (35, (16, 24), (5, 7)), (384, (16, 24), (16, 24)), (54, (24, 16), (9, 6))],
)  # fmt: skip
def test_grid_of_a_count(count, grid, target):
    assert target_grid(count, *grid) == target


@pytest.mark.parametrize(
    ("count", "grid", "message"),
    [(200, (24, 24), "square of a whole number, such as 196 or 225"), (0, (24, 24), "at least 1"),
     (-4, (24, 24), "at least 1"), (12.0, (24, 24), "whole number"), (True, (24, 24), "whole number"),
     (13, (16, 24), "no rectangle near the shape of a 16 × 24")],
)  # fmt: skip
def test_counts_that_do_not_fit(count, grid, message):
    with pytest.raises(ValueError, match=message):
        target_grid(count, *grid)


def test_patches_that_form_no_square():
    with pytest.raises(ValueError, match="24 patches form no square; name the grid"):
        TokenFlexProjector(4, 4, num_image_tokens=4)(torch.zeros(1, 24, 4))
    with pytest.raises(ValueError, match="pooling is one of adaptive, resize, not 'max'"):
        TokenFlexProjector(4, 4, pooling="max")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_pooling_sums_in_fp32(dtype):
    torch.manual_seed(0)
    rows = torch.randn(2, 12, 12, 8)
    for pool in (pool_grid, resize_pool_grid):
        exact = pool(rows.to(dtype).float(), 5, 5).to(dtype)
        assert pool(rows.to(dtype), 5, 5).dtype == dtype
        assert pool(rows.to(dtype), 5, 5).equal(exact)
