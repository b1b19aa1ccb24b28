# SPDX-License-Identifier: Apache-2.0
"""QueCC: one token per region of the image, read by attention whose query is the region plus the question.

Li et al., "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", arXiv 2411.03312 (ICLR 2025); the
official module is that of locuslab/llava-token-compression.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: the official layers of a 24-layer tower, as hidden states (0: the embeddings)
LAYERS = (12, 16, 22, 23)
#: prefixes of the official names: the module list of the projector inside the model
_RELEASED_PREFIX = "model.mm_projector."


def layers_for(depth: int) -> tuple[int, ...]:
    """Hidden states to read from a tower of ``depth`` layers: the official ones, or their places in another depth (ours)."""
    if depth == 24:
        return LAYERS
    found = sorted({*(max(1, round(depth * share)) for share in (1 / 2, 2 / 3, 11 / 12)), depth - 1})
    return tuple(layer for layer in found if 0 < layer < depth)


def _branch(inputs: int, width: int, eps: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
    )  # fmt: skip


class QueCC(nn.Module):
    """Query-conditioned convolutional cross-attention, [B, rows · cols, ·] patches → [B, m_h · m_w, d] regions.

    Patch features plus the question make a query per patch; a depth-wise convolution (kernel = stride) joins them to one
    per region; each attends to the multi-layer features of its own region. The question only moves that attention.

    Args:
        d: width of the tower.
        d_text: width of the language model.
        d_multi: width of the multi-layer features; the release has 4096 here, which means 4 · d of CLIP-L.
        grid: (rows, columns) of the patches.
        kernel: side of a region; it must divide both. With ``stride`` given, the official code's other pairs work too.
        stride: of the convolution; default ``kernel``.
        heads: of the attention.
        norm_eps: of every LayerNorm.
        dropout: share of the attention weights that training sets to 0.
        query: "llm_last_token" (the published one), "mean" (likewise a vector; the caller averages), or "none": no
            question, for ablation.

    Raises:
        ValueError: a kernel that does not fit the grid, a width that the heads do not divide.
    """

    def __init__(
        self,
        d: int,
        d_text: int,
        *,
        d_multi: int,
        grid: tuple[int, int],
        kernel: int = 4,
        stride: int | None = None,
        heads: int = 8,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        query: str = "llm_last_token",
    ):
        super().__init__()
        self.grid, self.regions = grid, regions_of(grid, kernel, stride)
        if d % heads:
            raise ValueError(f"A width of {d} does not split into {heads} heads.")
        self.query = query
        self.clip_attn = nn.MultiheadAttention(d, heads, dropout=dropout, batch_first=True)
        self.q_proj, self.k_proj, self.v_proj = (_branch(width, d, norm_eps) for width in (d, d_multi, d_multi))
        self.q_downsample = nn.Conv2d(d, d, kernel, stride=stride or kernel, groups=d)
        self.text_projection = nn.Sequential(nn.Linear(d_text, d), nn.LayerNorm(d, eps=norm_eps))

    def forward(self, x_multi: Tensor, text: Tensor | None, x: Tensor) -> Tensor:
        """``x_multi`` [B, n, d_multi], question ``text`` [B, 1, d_text], ``x`` [B, n, d]."""
        (rows, cols), (m_h, m_w) = self.grid, self.regions
        if self.query != "none":
            x = x + self.text_projection(text)
        queries = self.q_proj(x).mT.unflatten(2, (rows, cols))
        queries = self.q_downsample(queries).flatten(2).mT.flatten(0, 1)[:, None]  # [B · m², 1, d]
        keys, values = (self._split(branch(x_multi)) for branch in (self.k_proj, self.v_proj))
        out, _ = self.clip_attn(queries, keys, values, need_weights=False)
        return out.view(len(x), m_h * m_w, -1)

    def _split(self, table: Tensor) -> Tensor:
        """[B, rows · cols, d] → [B · m_h · m_w, patches of a region, d], raster order inside and outside."""
        (rows, cols), (m_h, m_w) = self.grid, self.regions
        blocks = table.view(len(table), m_h, rows // m_h, m_w, cols // m_w, -1)
        return blocks.transpose(2, 3).reshape(len(table) * m_h * m_w, -1, table.shape[-1])


def regions_of(grid: tuple[int, int], kernel: int, stride: int | None = None) -> tuple[int, int]:
    """(rows, columns) of the regions. Raises ``ValueError`` for a kernel and stride that do not fit the grid."""
    if isinstance(kernel, bool) or not isinstance(kernel, int) or kernel < 1:
        raise ValueError(f"kernel is the side of a region in patches, at least 1, not {kernel!r}.")
    rows, cols = grid
    if stride is None or stride == kernel:
        if rows % kernel or cols % kernel:
            raise ValueError(f"Regions of {kernel} × {kernel} patches do not fill a grid of {rows} × {cols}.")
        return rows // kernel, cols // kernel
    found = tuple((side - kernel) // stride + 1 for side in grid)
    if any(m < 1 or m * (side // m) != side for m, side in zip(found, grid, strict=True)):
        raise ValueError(f"Kernel {kernel} with stride {stride} does not split a grid of {rows} × {cols} into regions.")
    return found


def kernel_of(tokens: int, grid: tuple[int, int]) -> int:
    """Side of the regions that make ``tokens`` of a grid. Raises ``ValueError`` when no side does."""
    rows, cols = grid
    fits = {rows // k * (cols // k): k for k in range(1, min(grid) + 1) if not rows % k and not cols % k}
    if tokens not in fits:
        raise ValueError(f"QueCC makes {', '.join(map(str, fits))} tokens of {rows} × {cols} patches, not {tokens}.")
    return fits[tokens]


class QueCCProjector(nn.Module):
    """QueCC and LLaVA's two-layer projector behind it, on the joined hidden states that LLaVA hands over.

    [I, rows · cols, layers · d] → [I, N, d_text]. The question vectors come from :meth:`ask`: one for each image, in
    order. The single-layer features are the last of the joined ones.

    ``load_state_dict`` also takes the official names (``0.q_proj…``, ``1``, ``3``, with or without
    ``model.mm_projector.``).
    """

    #: entry of the model's configuration that describes it
    config_entry = "quecc"

    def __init__(self, d: int, d_text: int, *, layers: int, **options: Any):
        super().__init__()
        self.d = d
        self.compressor = QueCC(d, d_text, d_multi=layers * d, **options)
        self.mlp = nn.Sequential(nn.Linear(d, d_text), nn.GELU(), nn.Linear(d_text, d_text))
        self.question: Tensor | None = None
        self._once = False
        self.register_load_state_dict_pre_hook(_accept_released)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""
        return self.compressor.grid

    @property
    def output_grid(self) -> tuple[int, int]:
        """(rows, columns) of the tokens of one view."""
        return self.compressor.regions

    @property
    def per_token(self) -> nn.Module:
        """The part behind the compressor: every row of its input becomes one token."""
        return self.mlp

    def ask(self, question: Tensor | None, *, once: bool = False) -> None:
        """Set the question vectors [I, d_text] of the images to come, ``once``: of the next pass; None takes them away."""
        self.question, self._once = question, once

    def forward(self, x_multi: Tensor) -> Tensor:
        text = None
        if self.compressor.query != "none":
            if self.question is None:
                raise ValueError("QueCC reads the question; run the model inside vlmcompress.quecc.query(model, ...).")
            if len(self.question) != len(x_multi):
                raise ValueError(
                    f"There are {len(self.question)} question vectors for {len(x_multi)} images; where rows have other than "
                    "one image, vlmcompress.quecc.query takes their numbers as images=."
                )
            text = self.question.to(x_multi)[:, None]
            if self._once:
                self.question = None
        return self.mlp(self.compressor(x_multi, text, x_multi[..., -self.d :]))


def _accept_released(module: nn.Module, state: dict[str, Any], prefix: str, *_) -> None:
    """Rename official names to the module's own, in place."""
    for key in [key for key in state if key.startswith((prefix, _RELEASED_PREFIX))]:
        name = key.removeprefix(_RELEASED_PREFIX).removeprefix(prefix)
        first, _, rest = name.partition(".")
        if first == "0":
            state[f"{prefix}compressor.{rest}"] = state.pop(key)
        elif first in ("1", "3"):
            state[f"{prefix}mlp.{int(first) - 1}.{rest}"] = state.pop(key)


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """[B, D] the states ``hidden`` [B, S, D] at the last real token of every row, whatever side is padded."""
    end = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), end]
