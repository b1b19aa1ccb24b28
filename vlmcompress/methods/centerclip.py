# SPDX-License-Identifier: Apache-2.0
"""Token clustering inside a vision tower.

Zhao et al., "CenterCLIP: Token Clustering for Efficient Text-Video Retrieval", SIGIR 2022, arXiv 2205.00823.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.cluster import GRAPHS, METRICS, neighbours_of, space_time_window
from ..ops.segments import ALGORITHMS, Segments, events_of, frames_of_segments, join_segments
from ..registry import register_method
from ..views import Joined, TowerEdit, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@register_method("centerclip")
@dataclass(frozen=True)
class CenterClip(Method):
    """Cut a video into segments and keep the centres of each one's clusters of patches, behind one vision layer or more.

    At the entry of ``block`` the patches of a segment's frames are clustered together; the centres go on in their order
    in space and time, with the mean of the frames' special tokens, as one sequence (section 3 of the paper). An image is
    a video of one frame, so on vision-language models each view is clustered by itself.

    Differs from the released code: distances and their sums are exact, so ties fall to the lowest index on every device;
    frames that are padding take no part; segments need not divide the frames.

    Args:
        keep: centres per segment, or their share of the patches of one view.
        frames: frames of each video that follow each other in the tower's batch; 1: images.
        segments: sequences that a video becomes; no more than its frames.
        block: vision layer (0-based) at whose entry tokens are clustered; None: the middle of the tower, 6 of 12.
        schedule: several stages instead, each (block, segments, keep), in order; takes the place of the three.
        algorithm: "kmedoids" (k-medoids++) or "spectral"; baselines "pooling" (mean of the frames; ``keep`` has no
            effect) and "sampling" (evenly spaced patches).
        aggregation: a centre is the cluster's "medoid" or the "mean" of its members.
        metric, p, pre_norm: of k-medoids, see :func:`vlmcompress.ops.cluster.distances`.
        graph, sigma, neighbours: of the spectral form; neighbours None: 5 per frame, 5 more on grids of 100 patches.
        window: (space, time) joins in the spectral form only patches of one ``space`` × ``space`` window and ``time`` frames
            (the released code: 9 or 19, and 7); later stages of a schedule, whose tokens form no grid, go without.
        iterations, threshold: of k-medoids; threshold None runs all iterations and never waits for the host.

    Raises ``ValueError`` in a forward pass whose views do not divide into videos of ``frames``.
    """

    keep: int | float = 49
    frames: int = 1
    segments: int = 1
    block: int | None = None
    schedule: tuple[tuple[int, int, int | float], ...] | None = None
    algorithm: str = "kmedoids"
    aggregation: str = "medoid"
    metric: str = "euclidean"
    p: float = 2.0
    pre_norm: bool = False
    graph: str = "knn"
    sigma: float | str = 2.0
    neighbours: int | None = None
    window: tuple[int, int] | None = None
    iterations: int = 100
    threshold: float | None = 1e-6

    summary: ClassVar[str] = "clusters of patches inside the vision tower, one centre each; joins the frames of videos"
    paper: ClassVar[str] = "arXiv 2205.00823"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})

    @classmethod
    def from_blocks(cls, tokens: Sequence[int], segments: Sequence[int], frames: int, **options: Any) -> CenterClip:
        """The method whose stages follow from two lists with an entry per vision layer, as the released code has them.

        ``tokens`` per segment and ``segments`` per video in every block; raises what
        :func:`vlmcompress.ops.segments.events_of` raises, and ``ValueError`` where no block clusters.
        """
        events = events_of(tokens, segments, frames)
        if not events:
            raise ValueError("These two schedules never shorten anything; one of them has to fall at some block.")
        stages = tuple((event.block, event.frames[1], event.tokens[1]) for event in events)
        return cls(frames=frames, schedule=stages, **options)

    def validate(self) -> None:
        for name in ("frames", "segments", "iterations", *(["neighbours"] if self.neighbours is not None else [])):
            _check_count(name, getattr(self, name))
        choices = {
            "algorithm": ALGORITHMS, "aggregation": ("medoid", "mean"), "metric": METRICS, "graph": GRAPHS,
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}.")
        if self.sigma != "median" and (isinstance(self.sigma, str) or self.sigma <= 0):
            raise ValueError(f"sigma is a positive number or 'median', not {self.sigma!r}.")
        if self.window is not None:
            if not isinstance(self.window, tuple) or len(self.window) != 2:
                raise ValueError(f"window is None or two whole numbers (space, time), not {self.window!r}.")
            for length in self.window:
                _check_count("window's space or time", length)
        if self.p <= 0:
            raise ValueError(f"p, the order of the distance, is positive, not {self.p}.")
        if self.schedule == ():
            raise ValueError("schedule names at least one stage (block, segments, keep).")
        before = (0, self.frames)
        for stage in self._stages(1):
            if len(stage) != 3:
                raise ValueError(f"A stage of schedule is (block, segments, keep), not {stage!r}.")
            block, segments, keep = stage
            check_keep(keep)
            _check_count("segments", segments)
            if isinstance(block, bool) or not isinstance(block, int) or block <= before[0]:
                raise ValueError(f"The blocks of schedule are whole numbers from 1 on that go up, not {block!r}.")
            if self.schedule is not None and segments > before[1]:
                raise ValueError(
                    f"Segments can only become fewer, but block {block} asks for {segments} of {before[1]}."
                )
            before = (block, segments)

    def _stages(self, middle: int) -> tuple[tuple[int, int, int | float], ...]:
        """(block, segments, keep) of every stage; ``middle``: the block where none is named."""
        if self.schedule is not None:
            return self.schedule
        return ((middle if self.block is None else self.block, self.segments, self.keep),)

    def check_family(self, adapter: Adapter) -> None:
        last = adapter.feature_layer + 1
        for block, segments, _ in self._stages(self._middle(adapter)):
            if not 1 <= block <= last:
                raise ValueError(f"block lies between 1 and {last} in this tower, not {block}.")
            if not adapter.joins_views and (self.frames > 1 or segments > 1 or self.algorithm == "pooling"):
                raise ValueError(
                    "'centerclip' joins frames only in a tower that stands alone (CLIP, SigLIP, open_clip, timm); on a "
                    "vision-language model frames and segments are 1."
                )

    @staticmethod
    def _middle(adapter: Adapter) -> int:
        return max(1, (adapter.feature_layer + 2) // 2)

    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        return [block - 1 for block, _, _ in self._stages(self._middle(adapter))]

    def tower(self, layer: TowerLayer, state: dict) -> TowerEdit | None:
        stages = self._stages(layer.index + 1)
        _, segments, keep = next(stage for stage in stages if stage[0] == layer.index + 1)
        frames = self.frames if layer.frames is None else layer.frames
        if len(layer.hidden) % frames:
            raise ValueError(f"{len(layer.hidden)} frames do not divide into videos of {frames}.")
        segments = min(segments, frames)
        tokens = self._centres(layer, keep)
        if segments == frames and tokens >= layer.n and self.algorithm != "pooling":
            return None
        videos = len(layer.hidden) // frames
        joined = join_segments(
            layer.hidden, frames, segments, tokens, algorithm=self.algorithm, aggregation=self.aggregation,
            prefix=layer.prefix, mask=None if layer.alive is None else layer.alive.view(videos, frames),
            **self._clustering(layer, frames, segments),
        )  # fmt: skip
        size = -(-frames // segments) * layer.n
        if joined.clusters is not None:
            # the distances, and an eigendecomposition of about nine cubes
            work = 2 * size**2 * layer.hidden.shape[-1] + (9 * size**3 if self.algorithm == "spectral" else 0)
            state["flops"] = state.get("flops", 0) + videos * segments * work
        return self._edit(joined, layer, frames, segments)

    def _edit(self, joined: Segments, layer: TowerLayer, frames: int, segments: int) -> TowerEdit:
        """What ``join_segments`` answered, as an edit: images stay in their views, frames leave theirs."""
        rows = joined.hidden[:, layer.prefix :]
        if frames == 1:
            # a mean stands for all its members, a medoid for itself
            owner = joined.clusters.assign if joined.clusters is not None and self.aggregation == "mean" else None
            return TowerEdit(joined.patch, hidden=rows, owner=owner)
        video = torch.arange(len(layer.hidden) // frames, device=rows.device).repeat_interleave(segments)
        frame = joined.frame
        if frame is None:  # a mean over frames stands for the first of them
            first = frames_of_segments(frames, segments)[0][:, 0].to(rows.device)
            frame = first.repeat(len(layer.hidden) // frames)[:, None].expand_as(joined.patch)
        view = video[:, None] * frames + frame
        special = joined.hidden[:, : layer.prefix]
        return TowerEdit(joined.patch, hidden=rows, joined=Joined(special, view, segments, joined.valid.flatten()))

    def _centres(self, layer: TowerLayer, keep: int | float) -> int:
        """Centres per segment: a share is one of a view's patches; images of several views share an int among them."""
        if layer.frames is not None or self.frames > 1 or len(layer.layout.view_image) != len(layer.hidden):
            whole = layer.layout.view_grid[0] * layer.layout.view_grid[1]
            return tokens_to_keep(keep, whole) if isinstance(keep, float) else keep
        counts = layer.budgets(keep)
        if min(counts) != max(counts):
            raise ValueError(
                "'centerclip' keeps equally many centres in every view of a pass, and these images are cut into different "
                "numbers of views; give keep as a share (float) or run them singly."
            )
        return counts[0]

    def _clustering(self, layer: TowerLayer, frames: int, segments: int) -> dict[str, Any]:
        """Options of the clustering functions."""
        if self.algorithm not in ("kmedoids", "spectral"):
            return {}
        shared = {"iterations": self.iterations, "threshold": self.threshold}
        if self.algorithm == "kmedoids":
            return {"metric": self.metric, "p": self.p, "pre_norm": self.pre_norm, **shared}
        duration = -(-frames // segments)
        neighbours = neighbours_of(duration, layer.n) if self.neighbours is None else self.neighbours
        return {
            "graph": self.graph, "sigma": self.sigma, "neighbours": neighbours, "window": self._window(layer, duration),
            **shared,
        }  # fmt: skip

    def _window(self, layer: TowerLayer, duration: int) -> Tensor | None:
        """[N, N] bool: pairs of a segment's patches that the graph may join; None: all."""
        if self.window is None:
            return None
        if layer.group > 1 or layer.layout.view_n is not None:
            raise ValueError("window needs patches in raster order, which this tower does not have.")
        rows, cols = layer.layout.view_grid
        if layer.n != rows * cols:
            return None
        space, time = self.window
        return space_time_window(duration, rows, cols, space=space, time=time).to(layer.hidden.device)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number of at least 1, not {value!r}.")
