# SPDX-License-Identifier: Apache-2.0
"""The hooks of one handle on a vision tower without a language model, and the record of what passed through it."""

from __future__ import annotations

import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.encoder import EncoderAdapter
from ..adapters.raster import raster_layout
from ..compat import refuse_replays
from ..dtypes import LongTensor
from ..method import Composition
from .run import TowerState, Vision
from .tower import watch_tower


@dataclass
class TowerRecord:
    """What one pass through a tower did to its ``views`` of ``patches`` patches each.

    ``layer_tokens[l]``: tokens, special ones included, that vision layer l processed, ``layer_views[l]``: in how many
    sequences. ``cells`` [V', n']: patch of every token that is left, ``views_of`` [V', n']: the view (image or frame) it
    comes from; ``valid`` [V', n'] or None. ``alive`` [V'] bool or None: segments that are no padding. ``frames``: of each
    video that followed each other in the tower's batch, 1 for images. ``owner`` [V, n] or None: place among the tokens
    left that took in each patch, -1 where it was dropped.
    """

    views: int
    patches: int
    prefix: int
    frames: int
    layer_tokens: list[int]
    layer_views: list[int]
    cells: LongTensor
    views_of: LongTensor
    valid: Tensor | None
    alive: Tensor | None
    owner: LongTensor | None
    compressor_flops: int

    @property
    def samples(self) -> list[SampleRecord]:
        """One per image or video, in order."""
        kept: dict[int, list[int]] = defaultdict(list)
        valid = torch.ones_like(self.cells, dtype=torch.bool) if self.valid is None else self.valid
        for view, cell in zip(self.views_of[valid].tolist(), self.cells[valid].tolist(), strict=True):
            kept[view // self.frames].append(view % self.frames * self.patches + cell)
        count = self.frames * self.patches
        return [
            SampleRecord([ImageRecord(count, torch.tensor(sorted(kept[i]), dtype=torch.long))])
            for i in range(self.views // self.frames)
        ]


@dataclass
class ImageRecord:
    """One image or video: ``n_original`` patches, and ``kept``: sorted numbers of those left, frame by frame."""

    n_original: int
    kept: LongTensor


@dataclass
class SampleRecord:
    """The ``images`` (one image or one video) of one row of the caller's batch."""

    images: list[ImageRecord]


class TowerWiring:
    """What ``compress`` puts on a tower that stands alone. ``last``: the record of the last pass, None before one."""

    acts_on_cache = False

    def __init__(self, model: nn.Module, adapter: EncoderAdapter, method: Composition):
        self.model, self.adapter, self.method = model, adapter, method
        self.last: TowerRecord | None = None
        self._lock = threading.RLock()  # hooks of one pass must not see another thread's pictures
        self._local = threading.local()
        self._videos: tuple[int, Tensor | None] | None = None
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Put the hooks on."""
        eager = torch.compiler.disable
        tower, first = self.adapter.tower, self.adapter.tower_layers[0]
        self._hooks = [
            tower.register_forward_pre_hook(eager(self._before, recursive=True), with_kwargs=True),
            tower.register_forward_hook(
                eager(self._after, recursive=True), with_kwargs=True, always_call=True, prepend=True
            ),
            first.register_forward_pre_hook(eager(self._refuse_detour, recursive=True)),
        ]

    def remove(self) -> None:
        """Take everything off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextmanager
    def videos(self, frames: int, alive: Tensor | None):
        """Views are frames of videos of ``frames`` each meanwhile; ``alive`` [V] bool: those that are no padding."""
        with self._lock:
            self._videos = (frames, alive)
            try:
                yield
            finally:
                self._videos = None

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._lock.acquire()
        try:
            refuse_replays(self.model, self.method.name)
            self.adapter.check_training()
            pixels = args[0] if args else kwargs.get("pixel_values", kwargs.get("x"))
            layout = raster_layout(len(pixels), self.adapter.grid(pixels), pixels.device)
            vision = Vision(layout, pixel_values=pixels)
            watch_tower(vision, list(self.method.methods), self.adapter)
            assert vision.tower is not None
            if self._videos is not None:
                vision.tower.frames, vision.tower.alive = self._videos
            self._local.vision = vision
        except BaseException:
            self._lock.release()
            raise

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        vision, self._local.vision = self._current, None
        if vision is None:  # it was this tower's own pre-hook that refused
            return
        try:
            vision.release()
            if output is not None:
                self.last = self._record(vision)
        finally:
            self._lock.release()

    @property
    def _current(self) -> Vision | None:
        """The pass that this thread is in."""
        return getattr(self._local, "vision", None)

    def _refuse_detour(self, module: nn.Module, args: tuple) -> None:
        if self._current is None:
            raise ValueError(
                f"'{self.method.name}' acts when the tower itself is called; this call runs its layers past that "
                "(forward_features, forward_intermediates), where nothing would be compressed."
            )

    def _record(self, vision: Vision) -> TowerRecord:
        tower = vision.tower
        assert tower is not None
        views = len(vision.layout)
        own = (
            torch.arange(views, device=tower.ids.device)[:, None].expand_as(tower.ids)
            if tower.view is None
            else tower.view
        )
        flops = sum(state.get("flops", 0) for state in vision.states.values())
        return TowerRecord(
            views, tower.cells, self.adapter.tower_prefix, self._frames(tower, views), tower.tokens, tower.views,
            tower.ids, own, tower.valid, tower.alive, tower.owner, int(flops),
        )  # fmt: skip

    def _frames(self, tower: TowerState, views: int) -> int:
        """Frames of each video of a pass of ``views`` views."""
        if self._videos is not None:
            return self._videos[0]
        return 1 if tower.frames is None else views // (len(tower.ids) // tower.frames)
