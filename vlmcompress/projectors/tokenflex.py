# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX: one projector for any number of visual tokens.

Hu et al., "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", arXiv 2504.03154. The paper's training
code is not public; details come from the model that the same lab released (Ristretto-3B), so does ``pooling="resize"``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..ops.pool import pool_grid, resize_pool_grid, target_grid

POOLINGS = {"adaptive": pool_grid, "resize": resize_pool_grid}
#: names of the released model's modules and ours
RELEASED = {"layernorm": "norm", "f1": "gate", "f2": "up", "g": "down"}


class SwiGlu(nn.Module):
    """LayerNorm and a gated feed-forward, [..., d_vision] → [..., d_text]: the part that sees one token at a time."""

    def __init__(self, d_vision: int, d_text: int, *, hidden_ratio: int = 3, bias: bool = True, norm_eps: float = 1e-5):
        super().__init__()
        hidden = hidden_ratio * d_vision
        self.norm = nn.LayerNorm(d_vision, eps=norm_eps)
        self.gate = nn.Linear(d_vision, hidden, bias=bias)
        self.up = nn.Linear(d_vision, hidden, bias=bias)
        self.down = nn.Linear(hidden, d_text, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        z = self.norm(features)
        return self.down(nn.functional.silu(self.gate(z)) * self.up(z))


class TokenFlexProjector(nn.Module):
    """Average pooling to a grid of ``num_image_tokens``, then LayerNorm and SwiGLU on what is left.

    [V, rows · cols, d_vision] patch features in raster order, without CLS → [V, N, d_text]. Pooling has no parameters, so
    the same weights serve every N ≥ 1, trained or not; N above the number of patches repeats them. Weights keep the
    defaults of ``torch.nn``: the 0.02 normal that a ``post_init`` would draw cripples narrow models.

    ``load_state_dict`` also takes the released names (``layernorm``, ``f1``, ``f2``, ``g``), with or without
    ``projector.`` and ``mlp.``.

    Args:
        d_vision: width of the vision features.
        d_text: width of the language model.
        grid: (rows, columns) of the patches. Where it is given, features of another number are tokens that a compression
            method has already chosen, and go through unpooled. None: any square.
        num_image_tokens: the current N per view; may be set at any time. None: as many as there are patches.
        pooling: "adaptive" (the paper's words) or "resize" (the released weights); see ``vlmcompress.ops.pool``.
        hidden_ratio: width of the SwiGLU in units of ``d_vision``.
        bias: whether its linear layers have one.
        norm_eps: of the LayerNorm.

    Raises:
        ValueError: an unknown pooling, or at a call an N that does not fit the grid.
    """

    #: entry of the model's configuration that describes it
    config_entry = "tokenflex"

    def __init__(
        self,
        d_vision: int,
        d_text: int,
        *,
        grid: tuple[int, int] | None = None,
        num_image_tokens: int | None = None,
        pooling: str = "adaptive",
        hidden_ratio: int = 3,
        bias: bool = True,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is one of {', '.join(POOLINGS)}, not {pooling!r}.")
        self.grid, self.num_image_tokens, self.pooling = grid, num_image_tokens, pooling
        self.mlp = SwiGlu(d_vision, d_text, hidden_ratio=hidden_ratio, bias=bias, norm_eps=norm_eps)
        # the tower's own final norm, which LLaVA's choice of a hidden state leaves out; kept outside the module tree
        self.__dict__["tower_norm"] = None
        self.register_load_state_dict_pre_hook(_accept_released)

    def set_tower_norm(self, norm: nn.Module | None) -> None:
        """Pass features through ``norm`` first, a module that stays the tower's own."""
        self.__dict__["tower_norm"] = norm

    @property
    def per_token(self) -> nn.Module:
        """The part behind the pooling: every row of its input becomes one token."""
        return self.mlp

    @property
    def pooling_function(self):
        """[B, rows, cols, C], h, w → [B, h · w, C]."""
        return POOLINGS[self.pooling]

    @property
    def output_grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the tokens of one view; None where neither grid nor count is known."""
        if self.grid is None or self.num_image_tokens is None:
            return self.grid
        return target_grid(self.num_image_tokens, *self.grid)

    def pool(self, features: Tensor, *, grid: tuple[int, int] | None = None, target: tuple[int, int] | None = None):
        """[V, rows · cols, d] → [V, h · w, d]; ``grid`` and ``target`` (h, w) default to the projector's own."""
        patches = features.shape[1]
        if grid is None and self.grid is not None:
            if patches != self.grid[0] * self.grid[1]:
                return features
            grid = self.grid
        grid = square(patches) if grid is None else grid
        if target is None:
            target = grid if self.num_image_tokens is None else target_grid(self.num_image_tokens, *grid)
        if target == grid:
            return features
        return self.pooling_function(features.unflatten(1, grid), *target)

    def forward(
        self, features: Tensor, *, grid: tuple[int, int] | None = None, target: tuple[int, int] | None = None
    ) -> Tensor:
        norm = self.__dict__["tower_norm"]
        if norm is not None:
            features = norm(features)
        return self.mlp(self.pool(features, grid=grid, target=target))


def square(patches: int) -> tuple[int, int]:
    """(side, side) of a square grid. Raises ``ValueError`` when the number of patches is no square."""
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{patches} patches form no square; name the grid (rows, columns).")
    return side, side


def _accept_released(module: nn.Module, state: dict[str, Any], prefix: str, *_) -> None:
    """Rename ``prefix`` + [projector.][mlp.](layernorm | f1 | f2 | g | norm | gate | up | down) to our names, in place."""
    for key in [key for key in state if key.startswith(prefix)]:
        part, _, leaf = key[len(prefix) :].removeprefix("projector.").removeprefix("mlp.").partition(".")
        name = f"{prefix}mlp.{RELEASED.get(part, part)}.{leaf}"
        if leaf and name != key:
            state[name] = state.pop(key)
