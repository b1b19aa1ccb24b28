# SPDX-License-Identifier: Apache-2.0
"""Speed of image encoders: CenterCLIP's clustering and tower at the size of ViT-B/16, pruned towers on single images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import adapter_for
from ..attach import compress
from ..method import Method, create
from ..methods.centerclip import CenterClip
from ..ops.cluster import k_medoids
from .latency import Timing, clock, interleaved, peak_bytes


def _video_tower() -> nn.Module:
    import open_clip

    return open_clip.create_model("ViT-B-16")


def _image_tower() -> nn.Module:
    import timm

    return timm.create_model("vit_base_patch16_224")


@dataclass(frozen=True)
class Shape:
    """What is timed; default: ViT-B/16 on 224 pixels, 12 frames in 4 segments of 160 centres each, as in the paper.

    ``side``: pixels of a picture; ``patches`` and ``width``: of the towers, at whose size tokens are clustered; ``images``
    go through the second tower one by one, a quarter of their patches kept.
    """

    frames: int = 12
    segments: int = 4
    centres: int = 160
    patches: int = 196
    width: int = 768
    side: int = 224
    images: int = 8
    block: int = 6
    video_tower: Callable[[], nn.Module] = _video_tower
    image_tower: Callable[[], nn.Module] = _image_tower

    def __str__(self) -> str:
        return (
            f"width {self.width}, {self.patches} patches, random weights: one video of {self.frames} frames in "
            f"{self.segments} segments of {self.centres} centres (open_clip); {self.images} images, {self.patches // 4} "
            "patches kept (timm)"
        )


def cubic_k_medoids(x: Tensor, k: int, *, iterations: int = 100, threshold: float = 1e-6) -> Tensor:
    """[B, K] medoids of ``x`` [B, N, C], as the released code states it: for comparison of speed.

    Written from a description: the start looks at all chosen centres in every step, an update masks the distances of every
    cluster into a tensor of [B, K, N, N], and the stop waits for the host.
    """
    n = x.shape[1]
    distance = torch.cdist(x, x)
    distance = distance - distance.max() - 1
    distance = distance - torch.eye(n, dtype=x.dtype, device=x.device)
    row = torch.arange(len(x), device=x.device)
    chosen = x.norm(dim=-1).argmax(1, keepdim=True)
    for _ in range(1, k):
        nearest = distance.gather(1, chosen[..., None].expand(-1, -1, n)).amin(1)
        nearest[row[:, None], chosen] = -torch.inf
        chosen = torch.cat([chosen, nearest.argmax(1, keepdim=True)], 1)
    for _ in range(iterations):
        owner = distance.gather(1, chosen[..., None].expand(-1, -1, n)).argmin(1)
        member = owner[:, None] == torch.arange(k, device=x.device)[:, None]
        pairs = (member[..., None] & member[:, :, None]).to(x.dtype)
        found = (distance[:, None] * pairs).sum(-1).argmin(-1)
        moved = (_rows(x, found) - _rows(x, chosen)).norm(dim=-1).sum(-1).mean()
        chosen = found
        if moved < threshold:
            break
    return chosen.sort(dim=1).values


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def tokens(shape: Shape, device: str) -> Tensor:
    """[segments, N, C] tokens of frames that look alike, as in the middle of a tower."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.randn(shape.segments, 1, shape.patches, shape.width, generator=generator)
    count = shape.frames // shape.segments
    noise = torch.randn(shape.segments, count, shape.patches, shape.width, generator=generator)
    return (frame + 0.3 * noise).flatten(1, 2).to(device)


@torch.no_grad()
def clustering(shape: Shape, rounds: int, device: str, tick: Callable[[], None]) -> dict[str, Any]:
    """Both formulations on the segments of one video, in turn; how many of the tokens they choose are the same."""
    x, now = tokens(shape, device), clock(device)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: k_medoids(x, shape.centres).medoids,
        "released": lambda: cubic_k_medoids(x, shape.centres),
    }
    ours, released = (run().tolist() for run in runs.values())
    shared = sum(len(set(a) & set(b)) for a, b in zip(ours, released, strict=True))
    cases = {name: _timed(run, now) for name, run in runs.items()}
    times = _medians(interleaved(cases, rounds=rounds, tick=tick))
    return {
        "ms": times,
        "speedup": times["released"]["median"] / times["ours"]["median"],
        "same_medoids": shared / (shape.centres * len(ours)),
        "peak_bytes": {name: peak_bytes(run, device) for name, run in runs.items()},
    }


@torch.no_grad()
def towers(
    model: nn.Module,
    pixels: Tensor,
    methods: dict[str, Method | None],
    rounds: int,
    device: str,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Milliseconds that ``model`` takes for ``pixels`` [V, 3, H, W] with each method (None: uncompressed), in turn."""
    embed, now = adapter_for(model).embed, clock(device)

    def case(method: Method | None) -> Callable[[], float]:
        def timed() -> float:
            if method is None:
                return _timed(lambda: embed(pixels), now)()
            with compress(model, method) as handle:
                spent = _timed(lambda: embed(pixels), now)()
                reports[method] = handle.report()
            return spent

        return timed

    reports: dict[Method, Any] = {}
    cases = {name: case(method) for name, method in methods.items()}
    times = _medians(interleaved(cases, rounds=rounds, warmup=1, tick=tick))
    plain = next(times[name]["median"] for name, method in methods.items() if method is None)
    return {
        name: {
            "ms": times[name],
            "speedup": plain / times[name]["median"],
            "flops_share": 1.0 if method is None else reports[method].flops / reports[method].flops_before,
        }
        for name, method in methods.items()
    }


def video_methods(shape: Shape) -> dict[str, Method | None]:
    """The clustered tower of the paper's size, and even sampling, which only saves."""
    shared = {"keep": shape.centres, "frames": shape.frames, "segments": shape.segments, "block": shape.block}
    return {
        "uncompressed": None,
        "k-medoids": CenterClip(**shared),
        "k-medoids, 3 rounds": CenterClip(**shared, iterations=3, threshold=None),
        "sampling": CenterClip(**shared, algorithm="sampling"),
    }


def image_methods(shape: Shape) -> dict[str, Method | None]:
    """Methods for single images, a quarter of the patches kept."""
    names = ("tome", "tower-cls", "centerclip")
    return {"uncompressed": None, **{name: create(name, keep=shape.patches // 4).methods[0] for name in names}}


def _timed(run: Callable[[], Any], now: Callable[[], float]) -> Callable[[], float]:
    def timed() -> float:
        begin = now()
        run()
        return now() - begin

    return timed


def _medians(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    return {name: Timing.of(times).as_dict() for name, times in found.items()}
