# SPDX-License-Identifier: Apache-2.0
"""Frames of a video joined to segments inside a vision tower (CenterCLIP, arXiv 2205.00823), and its baselines.

Everywhere ``x`` is [B · T, prefix + n, C]: the frames of a video follow each other, ``prefix`` special tokens (CLS) come
first. All functions are differentiable with respect to the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import LongTensor
from .cluster import Clusters, cluster_means, k_medoids, neighbours_of, spectral_medoids

ALGORITHMS = ("kmedoids", "spectral", "pooling", "sampling")


@dataclass(frozen=True)
class Event:
    """Clustering at the entry of ``block`` (0-based): frames or segments and tokens of each, (before, after)."""

    block: int
    frames: tuple[int, int]
    tokens: tuple[int, int]

    @property
    def duration(self) -> int:
        """Frames that the longest segment joins."""
        return -(-self.frames[0] // self.frames[1])

    @property
    def neighbours(self) -> int:
        """Neighbours in the graph of spectral clustering."""
        return neighbours_of(self.duration, self.tokens[0])


def events_of(tokens: Sequence[int], segments: Sequence[int], frames: int) -> list[Event]:
    """The blocks that cluster, from two lists with an entry per block: tokens per segment and segments per video.

    A block clusters where it is to have more than one token per segment and fewer segments or fewer tokens than the one
    before; the first block is compared with ``frames`` and with its own number of tokens. Raises ``ValueError`` where
    the lists differ in length or the number of segments grows.
    """
    if len(tokens) != len(segments) or not tokens:
        raise ValueError(f"The two schedules name {len(tokens)} and {len(segments)} blocks; they need one entry each.")
    found, before = [], (frames, tokens[0])
    for block, after in enumerate(zip(segments, tokens, strict=True)):
        if not 1 <= after[0] <= before[0]:
            raise ValueError(f"Segments can only become fewer, but block {block} asks for {after[0]} of {before[0]}.")
        if after[1] > 1 and (after[0] < before[0] or after[1] < before[1]):
            found.append(Event(block, (before[0], after[0]), (before[1], after[1])))
        before = after
    return found


def frames_of_segments(frames: int, segments: int) -> tuple[LongTensor, Tensor]:
    """[S, r] frames of every segment and which of them are real.

    ``frames`` / ``segments`` each, in order; where that is no whole number, segments differ by one frame and the
    shorter ones repeat their last (the released code needs a whole number). No more segments than frames.
    """
    segments = min(segments, frames)
    border = torch.arange(segments + 1) * frames // segments
    length = -(-frames // segments)
    frame = border[:-1, None] + torch.arange(length)
    return frame.minimum(border[1:, None] - 1), frame < border[1:, None]


@dataclass
class Segments:
    """``hidden`` [B · S, prefix + K, C]; ``frame`` and ``patch`` [B · S, K]: where each centre comes from.

    ``frame`` is None where tokens are means over frames; ``valid`` [B, S]: segments whose last frame is valid.
    """

    hidden: Tensor
    frame: LongTensor | None
    patch: LongTensor
    valid: Tensor
    clusters: Clusters | None = None


def join_segments(
    x: Tensor,
    frames: int,
    segments: int,
    tokens: int,
    *,
    algorithm: str = "kmedoids",
    aggregation: str = "medoid",
    prefix: int = 1,
    mask: Tensor | None = None,
    random: bool = False,
    **options,
) -> Segments:
    """Cluster the patches of every segment to ``tokens`` centres; its special tokens are averaged over its frames.

    Args:
        x: [B · frames, prefix + n, C].
        frames, segments: per video; see :func:`frames_of_segments`.
        tokens: centres per segment, no more than there are patches.
        algorithm: "kmedoids" (k-medoids++), "spectral"; baselines "pooling" (mean over the segment's frames, ``tokens``
            has no effect) and "sampling" (evenly spaced patches).
        aggregation: "medoid" or "mean" of a cluster's members.
        mask: [B, frames] bool, valid frames, or None. Others neither take part nor count (ours; the released code lets
            padding in), except in segments of nothing else.
        random: "sampling" draws one patch per bin, as in training.
        **options: of :func:`.cluster.k_medoids` or :func:`.cluster.spectral_medoids`.

    Raises ``ValueError`` for an unknown algorithm or aggregation and where ``x`` does not divide into videos.
    """
    if algorithm not in ALGORITHMS or aggregation not in ("medoid", "mean"):
        raise ValueError(
            f"algorithm is one of {', '.join(ALGORITHMS)} and aggregation 'medoid' or 'mean', not {algorithm!r} and "
            f"{aggregation!r}."
        )
    if len(x) % frames:
        raise ValueError(f"{len(x)} frames do not divide into videos of {frames}.")
    number, real = (table.to(x.device) for table in frames_of_segments(frames, segments))
    videos = x.view(-1, frames, *x.shape[1:])
    batch, (count, length), n = len(videos), number.shape, x.shape[1] - prefix
    valid = torch.ones(batch, frames, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
    # of a segment without a valid frame all take part, as its tokens count for nothing later
    seen = valid[:, number] & real
    seen = (seen | (~seen.any(2, keepdim=True) & real)).view(batch * count, length)
    alive = valid[:, number[:, -1]]
    part = videos[:, number].view(batch * count, length, prefix + n, -1)
    share = (seen / seen.sum(1, keepdim=True))[:, :, None, None]
    lead = (part[:, :, :prefix] * share).sum(1).to(x.dtype)
    if algorithm == "pooling":
        pooled = (part[:, :, prefix:] * share).sum(1).to(x.dtype)
        patch = torch.arange(n, device=x.device).expand(len(part), -1)
        return Segments(torch.cat([lead, pooled], 1), None, patch, alive)

    patches = part[:, :, prefix:].flatten(1, 2)
    member = None if seen.all() else seen.repeat_interleave(n, 1)
    clusters = None
    if algorithm == "sampling":
        index = _sampled_frames(seen, n, tokens, random=random)
    else:
        if algorithm == "spectral":
            clusters = _spectral(patches, tokens, seen, n, options)
        else:
            clusters = k_medoids(patches, tokens, valid=member, **options)
        index = clusters.medoids
    if aggregation == "mean" and clusters is not None:
        centres = cluster_means(patches, clusters, member)
    else:
        centres = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
    frame = number.repeat(batch, 1).gather(1, index // n)
    return Segments(torch.cat([lead, centres], 1), frame, index % n, alive, clusters)


def _spectral(patches: Tensor, tokens: int, seen: Tensor, n: int, options: dict) -> Clusters:
    """Spectral clustering of every segment on its real frames ``seen`` [B · S, r], segments of one pattern at a time.

    A segment with fewer real patches than ``tokens`` lets the others in, as k-medoids does.
    """
    seen = seen | (seen.sum(1, keepdim=True) * n < tokens)
    if seen.all():
        return spectral_medoids(patches, tokens, **options)
    size = min(tokens, patches.shape[1])
    medoids = torch.zeros(len(patches), size, dtype=torch.long, device=patches.device)
    assign = medoids.new_zeros(patches.shape[:2])
    window = options.get("window")
    for pattern in seen.unique(dim=0):
        rows = (seen == pattern).all(1).nonzero()[:, 0]
        there = pattern.repeat_interleave(n).nonzero()[:, 0]
        if window is not None:
            options = options | {"window": window[there][:, there]}
        found = spectral_medoids(patches[rows][:, there], tokens, **options)
        medoids[rows] = there[found.medoids]
        assign[rows[:, None], there] = found.assign
    return Clusters(medoids, assign, medoids)


def _sampled_frames(seen: Tensor, n: int, tokens: int, *, random: bool) -> LongTensor:
    """[R, K] ascending patches of every segment, sampled from its frames ``seen`` [R, r] of ``n`` patches each.

    A segment with fewer of them than ``tokens`` lets the other frames in, as clustering does.
    """
    tokens = min(tokens, seen.shape[1] * n)
    seen = seen | (seen.sum(1, keepdim=True) * n < tokens)
    index = sampled(seen.sum(1) * n, tokens, random=random)
    frame = (~seen).to(torch.uint8).argsort(dim=1, stable=True).gather(1, index // n)
    return frame * n + index % n


def sampled(n: LongTensor, k: int, *, random: bool = False) -> LongTensor:
    """[R, k] ascending indices into ``n`` [R] ≥ ``k`` tokens: the middle of ``k`` equal bins, or a random place in each."""
    step = (n.double() / k)[:, None]
    place = torch.arange(k, device=n.device)
    offset = torch.rand(len(n), k, dtype=torch.float64, device=n.device) if random else 0.5
    return (place * step + offset * step).long().minimum(n[:, None] - 1)


def shift_channels(x: Tensor, frames: int, *, cls: bool, prefix: int = 1) -> Tensor:
    """Exchange channels between neighbouring frames: the first eighth comes from the next frame, the second eighth from
    the one before, zeros at the ends of a clip.

    ``cls``: only the special tokens do so (token shift), otherwise only the patches (temporal shift). Same shape as
    ``x`` [B · frames, prefix + n, C].
    """
    videos = x.view(-1, frames, *x.shape[1:])
    eighth = x.shape[-1] // 8
    moved = torch.zeros_like(videos)
    moved[:, :-1, :, :eighth] = videos[:, 1:, :, :eighth]
    moved[:, 1:, :, eighth : 2 * eighth] = videos[:, :-1, :, eighth : 2 * eighth]
    moved[..., 2 * eighth :] = videos[..., 2 * eighth :]
    special = (torch.arange(x.shape[1], device=x.device) < prefix)[:, None]
    return torch.where(special if cls else ~special, moved, videos).view_as(x)


def video_embedding(features: Tensor, valid: Tensor) -> Tensor:
    """[B, C] unit vector of every video: mean of its valid segments' unit vectors, ``features`` [B · S, C].

    ``valid`` [B, S] as in :class:`Segments`; a video without a valid segment takes all of them.
    """
    valid = valid | ~valid.any(1, keepdim=True)
    unit = torch.nn.functional.normalize(features, dim=-1).view(*valid.shape, -1)
    mean = (unit * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1)
