# SPDX-License-Identifier: Apache-2.0
"""What the Qwen vision-language families have in common: native resolution, one pack of patches, a 2 × 2 merger, M-RoPE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compat import merged_axes
from ..dtypes import LongTensor
from ..tokens import Layout
from .base import Adapter


class QwenVLAdapter(Adapter):
    """Base of the adapters of Qwen2-VL, Qwen2.5-VL and Qwen3-VL.

    The tower takes the patches of all images as one sequence, without a CLS token, in an order in which the patches of
    one later token follow each other; every image is a view, as is every frame of a video (which shows two). The merger
    joins the patches of a block of 2 × 2 to one token. Position ids carry time, row and column, behind a row of plain
    text positions where ``generate`` made them; survivors keep theirs, and ``rope_deltas`` stay those of the full
    prompt, so that decoding goes on from where it would.
    """

    mrope = True
    packed_tower = True
    joins_patches = True
    doors: ClassVar[dict[str, str]] = {"image": "get_image_features", "video": "get_video_features"}

    @property
    def tower(self) -> nn.Module:
        return self.inner.visual

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        return self.tower.blocks

    @property
    def projector(self) -> nn.Module:
        return self.tower.merger

    @property
    def tower_prefix(self) -> int:
        return 0

    @property
    def tower_scale(self) -> float:
        return self.tower_layers[0].attn.scaling

    @property
    def feature_layer(self) -> int:
        return len(self.tower_layers) - 1

    @property
    def patches_per_token(self) -> int:
        return self.tower.spatial_merge_size**2

    # tower ------------------------------------------------------------------------------------------------------
    def tower_norm(self, index: int) -> nn.Module:
        return self.tower_layers[index].norm1

    def tower_projections(self, index: int) -> dict[str, nn.Module]:
        return {"qkv": self.tower_layers[index].attn.qkv}

    def split_qkv(self, index: int, taps: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = taps["qkv"].unflatten(-1, (3, self.tower_layers[index].attn.num_heads, -1)).unbind(1)
        cos, sin = (table.unsqueeze(1).float() for table in taps["arguments"]["position_embeddings"])
        return _rotated(q, cos, sin), _rotated(k, cos, sin), v

    def unrotated_keys(self, index: int, taps: dict[str, Any]) -> Tensor | None:
        return taps["qkv"].unflatten(-1, (3, self.tower_layers[index].attn.num_heads, -1)).unbind(1)[1]

    def tower_arguments(self, kwargs: dict[str, Any], rows: LongTensor, counts: LongTensor) -> dict[str, Any]:
        ends = nn.functional.pad(counts.cumsum(0), (1, 0)).to(kwargs["cu_seqlens"].dtype)
        changed = {
            **kwargs,
            "cu_seqlens": ends,
            "position_embeddings": tuple(table[rows] for table in kwargs["position_embeddings"]),
        }
        if kwargs.get("max_seqlen") is not None:
            changed["max_seqlen"] = int(counts.max())
        return changed

    # projector --------------------------------------------------------------------------------------------------
    def projector_rows(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, self.patches_per_token * inputs.shape[-1])

    def projector_input(self, rows: Tensor, stock: Tensor) -> Tensor:
        return rows.reshape(-1, stock.shape[-1])

    # language model ---------------------------------------------------------------------------------------------
    def rotary(self, hidden: Tensor, positions: LongTensor) -> tuple[Tensor, Tensor]:
        if positions.ndim == 2:
            positions = positions.expand(3, -1, -1)
        return self.language_model.rotary_emb(hidden, position_ids=positions[-3:])

    def one_table(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return merged_axes(embeddings, self.text_config.rope_parameters["mrope_section"])

    def layer_positions(self, positions: LongTensor) -> LongTensor | None:
        return positions[0] if positions.ndim == 3 and len(positions) == 4 else None

    # geometry ---------------------------------------------------------------------------------------------------
    def geometry(self, given: dict[str, Any]) -> Layout:
        return self._layout("image", given["image_grid_thw"], given["pixel_values"].device)

    def video_geometry(self, given: dict[str, Any]) -> Layout:
        return self._layout("video", given["video_grid_thw"], given["pixel_values_videos"].device)

    remembers = ("rope_deltas",)

    def single_frames(self, given: dict[str, Any]) -> list[dict[str, Tensor]]:
        grids = given["video_grid_thw"]
        alone = grids.repeat_interleave(grids[:, 0], dim=0)
        alone[:, 0] = 1
        packs = given["pixel_values_videos"].split(alone.prod(1).tolist())
        return [
            {"pixel_values_videos": pack, "video_grid_thw": grid[None]} for pack, grid in zip(packs, alone, strict=True)
        ]

    def prompt_arguments(self, ids: LongTensor) -> dict[str, Tensor]:
        config = self.model.config
        return {"mm_token_type_ids": (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()}

    def _layout(self, kind: str, grid_thw: LongTensor, device: torch.device) -> Layout:
        merge = self.tower.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()]
        frames = torch.tensor([t for t, _, _ in grids])
        view_n = [h * w for t, h, w in grids for _ in range(t)]
        same = len({(h, w) for _, h, w in grids}) == 1
        view, cell, row, col = [], [], [], []
        first = 0
        for t, h, w in grids:
            number = torch.arange(t * h * w)
            view.append(first + number // (h * w))
            cell.append(number % (h * w))
            row.append(number // w)
            col.append(number % w)
            first += t
        view, cell, row, col, valid = (
            torch.nn.utils.rnn.pad_sequence(x, batch_first=True).to(device)
            for x in (view, cell, row, col, [torch.ones_like(x, dtype=torch.bool) for x in cell])
        )
        return Layout(
            n=[t * h * w for t, h, w in grids], grid=[(t * h, w) for t, h, w in grids], kind=[kind] * len(grids),
            view=view, cell=cell, row=row, col=col, valid=valid,
            view_image=torch.arange(len(grids)).repeat_interleave(frames).to(device),
            view_grid=grids[0][1:] if same else (1, max(view_n)), view_n=None if same else view_n,
            window=self.windows([(h, w) for t, h, w in grids for _ in range(t)], device),
        )  # fmt: skip

    def windows(self, grids: list[tuple[int, int]], device: torch.device) -> LongTensor | None:
        """``Layout.window`` of views of ``grids`` (rows, columns) tokens."""
        return None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[S, H, d] rotated by tables [S, 1, d], in fp32 as the tower's own attention does it."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
