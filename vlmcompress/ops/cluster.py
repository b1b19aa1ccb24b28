# SPDX-License-Identifier: Apache-2.0
"""Clustering of tokens around real tokens (CenterCLIP, arXiv 2205.00823): k-medoids++ and its spectral form.

Written from the paper and a description of the released code, not from that code. What differs: distances are exactly
symmetric with a zero diagonal, and sums of them are exact, so that ties (both members of a cluster of two always tie)
fall to the lowest index on every device; a batch is clustered at once without a [K, N, N] tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dtypes import LongTensor

METRICS = ("euclidean", "cosine")
GRAPHS = ("knn", "heat")


@dataclass
class Clusters:
    """``medoids`` [B, K] token numbers, ascending; ``assign`` [B, N] place in ``medoids`` of every token's centre.

    ``seeds`` [B, K]: the medoids that the KKZ start chose, in its order.
    """

    medoids: LongTensor
    assign: LongTensor
    seeds: LongTensor


def unit_rows(x: Tensor) -> Tensor:
    """``x`` [..., C] divided by its length + 1e-6, in fp64."""
    x = x.double()
    return x / (x.norm(dim=-1, keepdim=True) + 1e-6)


def distances(x: Tensor, *, metric: str = "euclidean", p: float = 2.0) -> Tensor:
    """[B, N, N] fp32 distances between the rows of ``x`` [B, N, C], symmetric, zero on the diagonal.

    "euclidean" is the Minkowski distance of order ``p``; "cosine" is 1 - cos with norms + 1e-6. Computed in fp64 and
    rounded once: the product form of the squared distance then keeps every digit that fp32 has, and equal rows come out
    at distance zero. Raises ``ValueError`` for another metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is one of {', '.join(METRICS)}, not {metric!r}.")
    if metric == "cosine":
        unit = unit_rows(x)
        found = 1 - unit @ unit.mT
    elif p == 2:
        x = x.double()
        # what all tokens share would only cost digits
        x = x - x.mean(1, keepdim=True)
        square = x.square().sum(-1)
        total = square[:, :, None] + square[:, None]
        found = torch.baddbmm(total, x, x.mT, alpha=-2)
        found = found.masked_fill(found <= 1e-13 * total, 0).sqrt()
    else:
        found = torch.cdist(x.double(), x.double(), p=p)
    found = found.float()
    # a product of matrices need not be symmetric to the last digit
    found = torch.minimum(found, found.mT)
    return found.clone().diagonal_scatter(found.new_zeros(found.shape[:2]), dim1=1, dim2=2)


def kkz_seeds(distance: Tensor, norm: Tensor, k: int, valid: Tensor | None = None) -> LongTensor:
    """[B, k] deterministic start: the longest token, then always the one farthest from all chosen ones.

    ``distance`` [B, N, N]; ``norm`` [B, N] lengths of the tokens. Ties: lowest index. Tokens that are not ``valid``
    [B, N] come last, by index. Only a running minimum is kept, nothing waits for the host.
    """
    batch = len(norm)
    row = torch.arange(batch, device=norm.device)
    seeds = torch.empty(batch, k, dtype=torch.long, device=norm.device)
    chosen = norm if valid is None else norm.masked_fill(~valid, -1)
    nearest = torch.full_like(distance[:, 0], torch.inf)
    if valid is not None:
        nearest = nearest.masked_fill(~valid, -1)  # behind every real one, before what is chosen already
    for place in range(k):
        pick = (chosen if place == 0 else nearest).argmax(1)
        seeds[:, place] = pick
        nearest = torch.minimum(nearest, distance[row, pick])
        nearest[row, pick] = -torch.inf
    return seeds


def assign_to(distance: Tensor, medoids: LongTensor) -> LongTensor:
    """[B, N] place in ``medoids`` [B, K] of every token's nearest one; ties: lowest place, a medoid keeps itself."""
    nearest = distance.gather(1, medoids[..., None].expand(-1, -1, distance.shape[2])).argmin(1)
    own = torch.arange(medoids.shape[1], device=medoids.device).expand_as(medoids)
    return nearest.scatter(1, medoids, own)


def update_medoids(
    distance: Tensor, assign: LongTensor, medoids: LongTensor, valid: Tensor | None = None
) -> LongTensor:
    """[B, K] the member of every cluster with the least sum of distances to all its members; ties: lowest index.

    A token belongs to one cluster, so one sum per token over those that share its cluster is all that is needed. Sums of
    fp32 numbers in fp64 are exact here, hence the same in any order. A cluster without a ``valid`` member stays.
    """
    same = assign[:, :, None] == assign[:, None]
    if valid is not None:
        same &= valid[:, None]
    cost = torch.where(same, distance, 0).sum(-1, dtype=torch.float64)
    if valid is not None:
        cost = cost.masked_fill(~valid, torch.inf)
    k, n = medoids.shape[1], cost.shape[1]
    least = cost.new_full(medoids.shape, torch.inf).scatter_reduce(1, assign, cost, "amin")
    number = torch.arange(n, device=cost.device).expand_as(cost)
    number = number.masked_fill((cost > least.gather(1, assign)) | cost.isinf(), n)
    found = torch.full((len(cost), k), n, device=cost.device).scatter_reduce(1, assign, number, "amin")
    return torch.where(found == n, medoids, found)


@torch.no_grad()
def k_medoids(
    x: Tensor,
    k: int,
    *,
    metric: str = "euclidean",
    p: float = 2.0,
    pre_norm: bool = False,
    iterations: int = 100,
    threshold: float | None = 1e-6,
    norm: Tensor | None = None,
    valid: Tensor | None = None,
    id_sort: bool = True,
) -> Clusters:
    """k-medoids++ on every item of a batch: KKZ start, then assignment and update in turn.

    Args:
        x: [B, N, C] tokens, any floating dtype; distances are fp32.
        k: clusters; ``k`` ≥ N gives all tokens in order.
        metric, p: see :func:`distances`.
        pre_norm: cluster on ``x / (|x| + 1e-6)``; the start still takes the longest token (ours: after division all
            lengths are one up to rounding, and rounding chose in the released code).
        iterations: most rounds of assignment and update.
        threshold: an item stops when its medoids have moved by less in all (Euclidean, summed over clusters). None runs
            all ``iterations`` without waiting for the host.
        norm: [B, N] lengths for the start, default those of ``x``.
        valid: [B, N] bool or None; others are no members and no centres, unless an item has fewer valid tokens than
            ``k``.
        id_sort: False leaves the medoids in the order of the start that they grew from.

    Raises ``ValueError`` for ``k`` or ``iterations`` below 1 and for an unknown metric.
    """
    if k < 1 or iterations < 1:
        raise ValueError(f"Clustering needs at least one cluster and one iteration, not {k} and {iterations}.")
    batch, n, _ = x.shape
    if k >= n:
        every = torch.arange(n, device=x.device).expand(batch, -1)
        return Clusters(every, every, every)
    if norm is None:
        norm = x.double().norm(dim=-1)
    points = unit_rows(x) if pre_norm else x
    distance = distances(points, metric=metric, p=p)
    seeds = medoids = kkz_seeds(distance, norm, k, valid)
    moving = torch.ones(batch, 1, dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        previous = medoids
        found = update_medoids(distance, assign_to(distance, medoids), medoids, valid)
        medoids = torch.where(moving, found, medoids)
        if threshold is None:
            continue
        step = _rows(points, medoids) - _rows(points, previous)
        moving = moving & (step.norm(dim=-1).sum(1, keepdim=True) >= threshold)
        if not moving.any():
            break
    if id_sort:
        medoids = medoids.sort(dim=1).values
    return Clusters(medoids, assign_to(distance, medoids), seeds)


def cluster_means(x: Tensor, clusters: Clusters, valid: Tensor | None = None) -> Tensor:
    """[B, K, C] mean of the members of every cluster of ``x`` [B, N, C], in fp32, returned in the input's dtype."""
    member = torch.nn.functional.one_hot(clusters.assign, clusters.medoids.shape[1]).float()
    if valid is not None:
        own = torch.zeros_like(valid).scatter(1, clusters.medoids, True)
        member = member * (valid | own)[..., None]
    return (member.mT @ x.float() / member.sum(1)[..., None]).to(x.dtype)


# spectral ---------------------------------------------------------------------------------------------------------
@dataclass
class Spectrum:
    """``embedding`` [B, N, K] fp64 rows of unit length; ``norm`` [B, N] their lengths before; ``eigenvalues`` [B, N].

    ``gap`` [B]: distance between eigenvalues K and K + 1; where it is tiny, the subspace itself is arbitrary.
    """

    embedding: Tensor
    norm: Tensor
    eigenvalues: Tensor
    gap: Tensor


def neighbours_of(frames: int, patches: int) -> int:
    """Neighbours q per token in the graph of a segment of ``frames`` frames: 5 per frame, 5 more on grids ≥ 100."""
    return 5 * frames + (0 if patches < 100 else 5)


def affinity(
    x: Tensor, *, graph: str = "knn", sigma: float | str = 2.0, neighbours: int = 10, window: Tensor | None = None
) -> Tensor:
    """[B, N, N] fp32 weights ``exp(-|x_i - x_j|² / (2 sigma²))``, the diagonal included.

    Args:
        x: [B, N, C].
        graph: "heat" keeps all weights; "knn" those that are among the ``neighbours`` largest of their row or column,
            the token itself counted. Equal weights at the border all stay.
        sigma: width of the kernel, or "median" for the median distance of each item (ours: far from the scale of the
            tokens every weight vanishes and the eigenvectors are arbitrary).
        window: [N, N] bool, pairs that may be joined (see :func:`space_time_window`), or None.

    Raises ``ValueError`` for another graph or a width that is not positive.
    """
    if graph not in GRAPHS:
        raise ValueError(f"graph is one of {', '.join(GRAPHS)}, not {graph!r}.")
    if sigma != "median" and (isinstance(sigma, str) or sigma <= 0):
        raise ValueError(f"sigma is a positive number or 'median', not {sigma!r}.")
    distance = distances(x)
    width = distance.flatten(1).median(1).values[:, None, None] if isinstance(sigma, str) else sigma
    weight = (-distance.square() / (2 * width**2)).exp()
    if graph == "knn":
        least = weight.topk(min(neighbours, weight.shape[-1]), dim=-1).values[..., -1:]
        near = weight >= least
        weight = weight.masked_fill(~(near | near.mT), 0)
    return weight if window is None else weight.masked_fill(~window, 0)


def spectrum(weight: Tensor, k: int) -> Spectrum:
    """The ``k`` eigenvectors of the normalised Laplacian of ``weight`` [B, N, N] with the smallest eigenvalues, by row.

    In fp64. The sign of an eigenvector changes no distance between rows, so none is fixed.
    """
    weight = weight.double()
    scale = weight.sum(-1).rsqrt()
    eye = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    values, vectors = torch.linalg.eigh(eye - scale[:, :, None] * weight * scale[:, None])
    rows = vectors[..., :k]
    gap = values[:, k] - values[:, k - 1] if k < values.shape[1] else torch.full_like(values[:, 0], torch.inf)
    return Spectrum(unit_rows(rows), rows.norm(dim=-1), values, gap)


@torch.no_grad()
def spectral_medoids(
    x: Tensor,
    k: int,
    *,
    graph: str = "knn",
    sigma: float | str = 2.0,
    neighbours: int = 10,
    window: Tensor | None = None,
    iterations: int = 100,
    threshold: float | None = 1e-6,
) -> Clusters:
    """Spectral clustering of ``x`` [B, N, C] into ``k`` clusters: k-medoids++ on the spectral embedding.

    Arguments as for :func:`affinity` and :func:`k_medoids`. The start takes the row that was longest before rows were
    brought to one length (ours). Raises what those raise.
    """
    if k >= x.shape[1]:
        return k_medoids(x, k)
    found = spectrum(affinity(x, graph=graph, sigma=sigma, neighbours=neighbours, window=window), k)
    return k_medoids(found.embedding, k, iterations=iterations, threshold=threshold, norm=found.norm)


def space_time_window(frames: int, rows: int, cols: int, *, space: int, time: int) -> Tensor:
    """[N, N] bool for N = frames · rows · cols tokens, frame-major: whether two lie in one ``space`` × ``space`` window
    of patches and ``time`` frames around each other."""
    place = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols))
    apart = (place[:, None] - place).abs()
    return (apart <= torch.tensor([time // 2, space // 2, space // 2])).all(-1)


def _rows(x: Tensor, index: LongTensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
