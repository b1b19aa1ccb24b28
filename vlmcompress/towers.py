# SPDX-License-Identifier: Apache-2.0
"""Handles and reports for vision towers without a language model: CLIP pairs, open_clip, timm."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .attach import Handle
from .hooks.standalone import TowerRecord, TowerWiring
from .ops.segments import video_embedding

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .adapters.encoder import EncoderAdapter


@dataclass(frozen=True)
class TowerReport:
    """Numbers of one pass, summed over ``views`` (images or frames); ``*_before`` is the uncompressed tower.

    ``layer_tokens[l]``: tokens, special ones included, that vision layer l processed. ``flops``: matrix products of the
    layers with the method's own work, ``compressor_flops``, inside; patch embedding and head are left out.
    """

    views: int
    frames: int
    tokens_before: int
    tokens: int
    layer_tokens: tuple[int, ...]
    flops_before: float
    flops: float
    compressor_flops: float

    @classmethod
    def from_record(cls, adapter: EncoderAdapter, record: TowerRecord) -> TowerReport:
        """Read the numbers off the record of a pass through the tower of ``adapter``."""
        from .eval.flops import Stack

        heads, width = adapter.tower_heads, adapter.tower_width
        stack = Stack(len(adapter.tower_layers), width, adapter.mlp_width, heads, heads, width // heads, gated=False)
        each = record.patches + record.prefix
        layers = zip(record.layer_tokens, record.layer_views, strict=True)
        flops = sum(stack.layer_flops(n, n / views) for n, views in layers)
        real = record.cells.numel() if record.valid is None else int(record.valid.sum())
        return cls(
            views=record.views,
            frames=record.frames,
            tokens_before=record.views * record.patches,
            tokens=real,
            layer_tokens=tuple(record.layer_tokens),
            flops_before=float(record.views * stack.layers * stack.layer_flops(each)),
            flops=float(flops + record.compressor_flops),
            compressor_flops=float(record.compressor_flops),
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        from rich.table import Table

        shown = (
            f"{self.views // self.frames} video(s) of {self.frames} frames"
            if self.frames > 1
            else f"{self.views} image(s)"
        )
        table = Table(title=shown)
        for column in ("", "uncompressed", "compressed", "share"):
            table.add_column(column, justify="left" if not column else "right", no_wrap=True)
        for label, before, after, form in (
            ("patches left in the end", self.tokens_before, self.tokens, ",.0f"),
            ("GFLOPs of the layers", self.flops_before / 1e9, self.flops / 1e9, ",.4g"),
        ):
            table.add_row(label, f"{before:{form}}", f"{after:{form}}", f"{after / before:.1%}")
        table.add_row("of which the method's own GFLOPs", "", f"{self.compressor_flops / 1e9:,.4g}", "")
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=96, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


class EncoderHandle(Handle):
    """One method on one vision tower that stands alone. Made by :func:`vlmcompress.compress`."""

    def _wire(self) -> TowerWiring:
        return TowerWiring(self.model, self.adapter, self.method)

    @property
    def last(self) -> TowerRecord:  # type: ignore[override]
        """The record of the last pass. Raises ``ValueError`` before there was one."""
        if self._wiring.last is None:
            raise ValueError("Nothing has passed through this tower yet; run it on a picture first.")
        return self._wiring.last

    def report(self) -> TowerReport:  # type: ignore[override]
        """Tokens and FLOPs of the last pass; prints as a table. Raises ``ValueError`` before there was one."""
        return TowerReport.from_record(self.adapter, self.last)

    def encode_videos(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed videos: the mean of the unit vectors of their frames, or of their segments where the method joins frames.

        Args:
            pixel_values: [B, T, 3, H, W]; T goes before the method's own ``frames``.
            mask: [B, T] bool, frames that are no padding (which stands at the end), or None. Padding takes part in no
                cluster and does not count.

        Returns:
            [B, E] unit vectors.

        Raises:
            ValueError: for other shapes, and for a video without a valid frame.
        """
        if pixel_values.ndim != 5:
            raise ValueError(f"Videos come as [videos, frames, 3, height, width], not {list(pixel_values.shape)}.")
        videos, frames = pixel_values.shape[:2]
        alive = torch.ones(videos, frames, dtype=torch.bool, device=pixel_values.device)
        if mask is not None:
            if tuple(mask.shape) != (videos, frames):
                raise ValueError(f"mask is [videos, frames], {[videos, frames]} here, not {list(mask.shape)}.")
            alive = mask.to(pixel_values.device).bool()
            if not bool(alive.any(1).all()):
                raise ValueError("Every video needs at least one frame that is no padding.")
        with self._wiring.videos(frames, None if mask is None else alive.flatten()):
            rows = self.adapter.embed(pixel_values.flatten(0, 1))
            left = self.last.alive
        valid = alive if left is None else left
        return video_embedding(rows, valid.view(videos, len(rows) // videos))
