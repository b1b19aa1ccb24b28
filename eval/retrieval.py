# SPDX-License-Identifier: Apache-2.0
"""Text–video retrieval on the video scenes: recall of a CLIP model of open_clip with each method in its tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.base import adapter_for
from ..attach import compress
from ..method import create
from ..ops.segments import video_embedding
from ..training.retrieval import Video, distinct_videos, pixels, recalls
from ..training.tiny_clip import TEST_SEED
from .latency import clock
from .rows import Row
from .stats import wilson

#: the uncompressed tower, the method at two budgets and its own baselines; 8 frames of 64 patches
ROWS = (
    "none",
    *(f"centerclip segments={s} keep={k}" for s, k in ((4, 32), (4, 16), (2, 32), (2, 16))),
    "centerclip segments=4 keep=16 algorithm=spectral sigma=median",
    *(f"centerclip segments={s} keep={k} algorithm=sampling" for s, k in ((4, 32), (4, 16), (2, 32), (2, 16))),
    "centerclip segments=4 algorithm=pooling",
    "centerclip keep=16",
    "tome keep=16",
    "tower-cls keep=16",
)


@dataclass
class Encoder:
    """A CLIP model with the tokenizer that its text tower takes."""

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]


def load(folder: str) -> Encoder:
    """The open_clip model in ``folder``. Raises ``ValueError`` where there is none, or none for 64 × 64 pixels."""
    import open_clip

    if not (Path(folder) / "open_clip_config.json").is_file():
        raise ValueError(f"There is no open_clip model in {folder}: it has no open_clip_config.json.")
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    size = model.visual.image_size
    if tuple(size) != (64, 64):
        raise ValueError(f"The video scenes have 64 × 64 pixels, but this model takes {size[0]} × {size[1]}.")
    return Encoder(model, open_clip.get_tokenizer(f"local-dir:{folder}"))


@torch.no_grad()
def measure(
    encoder: Encoder, rows: Sequence[Row], count: int, tick: Callable[[str, int], None], batch: int = 16
) -> list[dict[str, Any]]:
    """One entry per row: recalls in per cent with their intervals, tokens and FLOPs of a video, milliseconds of the tower.

    All rows see the same ``count`` videos, whose captions all differ. ``tick``: told the row and the videos it has seen.
    """
    videos = distinct_videos(TEST_SEED, count)
    captions = encoder.tokenizer([video.caption for video in videos])
    told = F.normalize(torch.cat([encoder.model.encode_text(part) for part in captions.split(64)]), dim=-1)
    return [_row(encoder.model, row, videos, told, tick, batch) for row in rows]


def _row(model: nn.Module, row: Row, videos: list[Video], told: Tensor, tick, batch: int) -> dict[str, Any]:
    method = None if row.method == "none" else create(row.method, **row.arguments(None))
    seen, spent, now, report = [], 0.0, clock("cpu"), None
    with nullcontext() if method is None else compress(model, method) as handle:
        for start in range(0, len(videos), batch):
            part = videos[start : start + batch]
            shown = pixels([video.frames for video in part])
            begin = now()
            seen.append(_frames_mean(model, shown) if handle is None else handle.encode_videos(shown))
            spent += now() - begin
            tick(row.key, len(part))
        if handle is not None:
            report = handle.report()
    found = recalls(told, torch.cat(seen))
    frames = videos[0].frames.shape[0]
    last = None if report is None else report.views // frames
    return {
        "row": row.key,
        "method": row.method,
        "options": row.arguments(None),
        "videos": len(videos),
        "ms_per_video": spent / len(videos),
        "tokens_per_video": None if report is None else report.tokens / last,
        "flops_share": 1.0 if report is None else report.flops / report.flops_before,
        "recall": {name: {"value": value, **_interval(value, len(videos))} for name, value in found.items()},
    }


def _frames_mean(model: nn.Module, shown: Tensor) -> Tensor:
    rows = adapter_for(model).embed(shown.flatten(0, 1))
    return video_embedding(rows, torch.ones(shown.shape[:2], dtype=torch.bool))


def _interval(value: float, n: int) -> dict[str, float]:
    found = wilson(round(value * n / 100), n)
    return {"low": 100 * found.low, "high": 100 * found.high}
