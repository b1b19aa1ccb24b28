# SPDX-License-Identifier: Apache-2.0
"""The row ``resize`` of models that take pictures at their own size (Qwen): smaller pictures in front of the processor.

There is nothing to hook: fewer pixels make fewer tokens, and the model treats them as it treats any small picture. This
is how such models are told to spend less in practice, and it beats most published methods on them (arXiv 2510.07143).
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..method import tokens_to_keep
from .rows import Row

Chat = list[dict[str, Any]]
DISTORTION = 1.25  # how far the shape of a picture may change, where that makes more tokens fit


def downscales(processor: Any, row: Row) -> bool:
    """Whether ``row`` means smaller pictures for this ``processor`` instead of a method on the model."""
    return row.method == "resize" and hasattr(getattr(processor, "image_processor", None), "merge_size")


def downscaled(processor: Any, chat: Chat, keep: int | float) -> Chat:
    """The chat with every picture and video shrunk until it makes at most ``keep`` tokens, or that share of its tokens.

    All frames of a video shrink alike. Raises ``ValueError`` in one sentence for pictures that are no ``PIL`` images, for a
    budget below one token per frame and for one below the least that the processor makes of a picture.
    """
    return [{**message, "content": [_part(processor, part, keep) for part in message["content"]]} for message in chat]


def _part(processor: Any, part: dict[str, Any], keep: int | float) -> dict[str, Any]:
    kind = part["type"]
    if kind not in ("image", "video"):
        return part
    shown = [part[kind]] if kind == "image" else list(part[kind])
    if not all(isinstance(picture, Image.Image) for picture in shown):
        raise ValueError("'resize' shrinks pictures that are loaded, not addresses of files.")
    if kind == "image":
        reader, grid = processor.image_processor, processor.image_processor(images=shown)["image_grid_thw"]
    else:
        reader, grid = processor.video_processor, processor.video_processor(videos=[shown])["video_grid_thw"]
    times, rows, cols = (int(n) for n in grid[0])
    rows, cols = rows // reader.merge_size, cols // reader.merge_size
    budget = tokens_to_keep(keep, times * rows * cols) // times
    if not budget:
        raise ValueError(f"'resize' cannot show {times} frames in {keep} tokens.")
    rows, cols = _grid(budget, rows, cols)
    cell = reader.patch_size * reader.merge_size
    least = reader.size["shortest_edge"]
    if rows * cols * cell**2 < least:
        raise ValueError(f"This model's processor makes at least {least // cell**2} tokens of a picture, not {budget}.")
    small = [picture.resize((cols * cell, rows * cell), Image.Resampling.BICUBIC) for picture in shown]
    return {**part, kind: small[0] if kind == "image" else small}


def _grid(budget: int, rows: int, cols: int) -> tuple[int, int]:
    """Rows and columns of at most ``budget`` tokens: the most tokens that keep the picture's shape, or nearly."""

    def distortion(r: int, c: int) -> float:
        ratio = (r * cols) / (c * rows)
        return max(ratio, 1 / ratio)

    grids = [(r, c) for r in range(1, rows + 1) for c in range(1, cols + 1) if r * c <= budget]
    least = min(distortion(*grid) for grid in grids)
    kept = [grid for grid in grids if distortion(*grid) <= max(DISTORTION, least)]
    return max(kept, key=lambda grid: (grid[0] * grid[1], -distortion(*grid)))
