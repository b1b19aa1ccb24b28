# SPDX-License-Identifier: Apache-2.0
"""What a method sees of one vision layer, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .dtypes import LongTensor
from .method import tokens_to_keep
from .ops.scores import attention_row
from .tokens import Layout


@dataclass
class TowerLayer:
    """One vision layer that has just run on ``V`` views with ``prefix`` special tokens (CLS) and ``n`` patches each.

    ``hidden`` [V, prefix + n, C]: its output. ``q``, ``k``, ``v`` [V, H, prefix + n, d]: its projections, as the
    layer's own attention used them. ``ids`` [V, n]: original cell of every patch; ``valid`` [V, n] or None;
    ``bias`` [V, prefix + n] or None: what is added to attention logits per key (padding, merged sizes). The projector
    joins ``group`` patches to a token: patch ``group · c + j`` belongs to cell c. ``whole_tokens``: the patches of one
    token can only leave together. ``global_layers``: vision layers in which a patch sees its whole view; in the others
    it attends inside a window only, which ``q`` and ``k`` do not show. ``plain_k``: the keys before any rotary embedding.
    ``native``: views keep their own resolution instead of being brought to one size. ``frames``: where the views are
    frames of videos, how many (or how many segments) of each follow each other, else None; ``alive`` [V]: views that are
    no padding of a shorter video, None for all.
    """

    index: int
    depth: int
    feature_layer: int
    hidden: Tensor
    scale: float
    prefix: int
    has_cls: bool
    ids: LongTensor
    valid: Tensor | None
    bias: Tensor | None
    layout: Layout
    group: int = 1
    whole_tokens: bool = False
    global_layers: Sequence[int] = ()
    native: bool = False
    frames: int | None = None
    alive: Tensor | None = None
    _following: Callable[[], Tensor] | None = None
    _projected: Callable[[str], Tensor] | None = None

    # read when a method asks: towers with fused attention have to make them once more
    @cached_property
    def q(self) -> Tensor:
        return self._project("q")

    @cached_property
    def k(self) -> Tensor:
        return self._project("k")

    @cached_property
    def v(self) -> Tensor:
        return self._project("v")

    @cached_property
    def plain_k(self) -> Tensor:
        return self._project("plain_k")

    def _project(self, name: str) -> Tensor:
        assert self._projected is not None
        return self._projected(name)

    @property
    def n(self) -> int:
        return self.ids.shape[1]

    @property
    def in_windows(self) -> bool:
        """Whether this layer's patches attend inside windows of their view."""
        return self.index not in self.global_layers

    @property
    def patches(self) -> Tensor:
        """[V, n, C] output rows without the special tokens."""
        return self.hidden[:, self.prefix :]

    def per_token(self, per_patch: Tensor) -> Tensor:
        """[V, n] per patch → [V, n / group]: the sum over the patches that make up a token.

        Where the model pools patches with weights, their weighted sum: [V, N].
        """
        if self.layout.pooling is not None:
            return self.layout.pooling(per_patch)
        return per_patch if self.group == 1 else per_patch.unflatten(1, (-1, self.group)).sum(-1)

    @property
    def token_ids(self) -> LongTensor:
        """[V, m] original cell of every token that the patches make up, whole tokens standing together."""
        if self.layout.pooling is not None:
            cells = self.layout.view_grid[0] * self.layout.view_grid[1]
            return torch.arange(cells, device=self.ids.device).expand(len(self.ids), -1)
        return self.ids[:, :: self.group] // self.group

    @property
    def token_valid(self) -> Tensor | None:
        """[V, m] bool or None: which of them are real."""
        if self.layout.pooling is not None:
            return self.layout.pooling.weight.sum(-1) > 0
        return None if self.valid is None else self.valid[:, :: self.group]

    def cls_row(self) -> Tensor:
        """[V, n] fp32: mean over heads of the softmax of the CLS query over all keys; the CLS column dropped."""
        return attention_row(self.q[:, :, 0], self.k, self.scale, self.bias).mean(1)[:, self.prefix :]

    def cls_logits(self, *, following: bool = False) -> Tensor:
        """[V, n] fp32: mean over heads of the CLS query's logits before the softmax; the CLS column left out.

        ``following=True`` asks the next layer's projections, applied to this layer's output; that layer need not run.
        """
        if following:
            assert self._following is not None
            return self._following()
        logits = torch.einsum("vhd,vhnd->vn", self.q[:, :, 0].float(), self.k[:, :, self.prefix :].float())
        return logits * (self.scale / self.q.shape[1])

    def budgets(self, keep: int | float) -> list[int]:
        """Tokens that each view may keep: its share of its cells, or its image's number split evenly over its views."""
        views = torch.bincount(self.layout.view_image, minlength=len(self.layout)).tolist()
        cells = self.layout.view_grid[0] * self.layout.view_grid[1]
        if self.layout.pooling is not None:
            cells = self.layout.pooling.patches
        if isinstance(keep, float):
            return [tokens_to_keep(keep, cells)] * len(self.layout.view_image)
        return [
            max(1, tokens_to_keep(keep, views[i] * cells) // views[i]) for i in self.layout.view_image.tolist()
        ]  # fmt: skip


@dataclass
class TowerEdit:
    """The patches that go on to the next vision layer.

    ``keep`` [V, n']: local indices in the order in which they go on (representatives where patches were merged);
    ``hidden`` [V, n', C]: new rows, default the gathered ones; ``valid`` [V, n']; ``owner`` [V, n]: place in ``keep``
    that took in each present patch (-1: dropped); ``bias`` [V, n']: added to the attention logits of these keys from
    now on (log of merged sizes). ``newlines``: whether the newline of every row of a tiled picture that keeps a token
    stays. ``leading``: where the projector joins patches of different cells to a token, which then has no place of its
    own, tokens take their image's first places. ``flat``: the views of a tiled picture follow each other, each in the
    order of ``keep``, without newlines. ``joined``: views were joined to fewer; then ``hidden`` is given, and all tensors
    are [V', …].
    """

    keep: LongTensor
    hidden: Tensor | None = None
    valid: Tensor | None = None
    owner: LongTensor | None = None
    bias: Tensor | None = None
    newlines: bool = True
    leading: bool = False
    flat: bool = False
    joined: Joined | None = None


@dataclass
class Joined:
    """How an edit joined the frames of videos to ``frames`` segments each, V' in all.

    ``special`` [V', prefix, C]: their special tokens; ``view`` [V', n']: the view that each kept patch comes from;
    ``alive`` [V'] bool: segments that are no padding.
    """

    special: Tensor
    view: LongTensor
    frames: int
    alive: Tensor
