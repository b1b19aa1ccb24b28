# SPDX-License-Identifier: Apache-2.0
"""Rules of the token clustering that no published number fixes: ties, masks, uneven segments, gradients."""

from __future__ import annotations

import pytest
import torch

from vlmcompress.ops.cluster import affinity, distances, k_medoids, space_time_window, spectral_medoids
from vlmcompress.ops.segments import events_of, frames_of_segments, join_segments, sampled, video_embedding


def plain_k_medoids(x, k, rounds=100):
    """One item, token by token, as the paper has it."""
    x = x.double()
    d = [[0.0 if i == j else float((a - b).norm()) for j, b in enumerate(x)] for i, a in enumerate(x)]
    n = len(x)
    medoids = [max(range(n), key=lambda i: (float(x[i].norm()), -i))]
    while len(medoids) < k:
        rest = [i for i in range(n) if i not in medoids]
        medoids.append(max(rest, key=lambda i: (min(d[i][c] for c in medoids), -i)))

    def assign(medoids):
        return [
            medoids.index(i) if i in medoids else min(range(k), key=lambda c: (d[i][medoids[c]], c)) for i in range(n)
        ]

    for _ in range(rounds):
        owner = assign(medoids)
        members = [[i for i in range(n) if owner[i] == c] for c in range(k)]
        after = [min(m, key=lambda i: (round(sum(d[i][j] for j in m), 9), i)) for m in members]
        if after == medoids:
            break
        medoids = after
    medoids = sorted(medoids)
    return medoids, assign(medoids)


@pytest.mark.parametrize("k", [1, 3, 7, 12, 23])
def test_against_token_by_token(k):
    x = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(k))
    found = k_medoids(x, k)
    for row in range(3):
        medoids, owner = plain_k_medoids(x[row], k)
        assert found.medoids[row].tolist() == medoids and found.assign[row].tolist() == owner


def test_unsorted_medoids_stand_where_their_seeds_did():
    x = torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(2))
    whole, plain = k_medoids(x, 7), k_medoids(x, 7, id_sort=False)
    assert plain.medoids.sort(dim=1).values.equal(whole.medoids) and not plain.medoids.equal(whole.medoids)
    assert plain.medoids.gather(1, plain.assign).equal(whole.medoids.gather(1, whole.assign))
    seeds = k_medoids(x, 7, id_sort=False, iterations=1)
    # a seed stays in the cluster that grew from it
    first = distances(x).gather(1, seeds.seeds[..., None].expand(-1, -1, 24)).argmin(1)
    assert first.gather(1, seeds.medoids).equal(torch.arange(7).expand(3, -1))


def test_static_clip_takes_the_first_frame():
    frame = torch.randn(2, 10, 6, generator=torch.Generator().manual_seed(0))
    found = k_medoids(frame.repeat(1, 3, 1), 10)
    assert found.medoids.equal(torch.arange(10).expand(2, -1))
    assert found.assign.equal(torch.arange(10).repeat(3).expand(2, -1))
    assert k_medoids(torch.ones(1, 6, 4), 3).medoids.tolist() == [[0, 1, 2]]


def test_distances_are_symmetric_and_zero_for_equal_rows():
    x = 100 + torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(1))
    x[:, 20:] = x[:, :20]
    for options in ({}, {"p": 1.0}, {"p": 3.0}, {"metric": "cosine"}):
        found = distances(x, **options)
        assert found.equal(found.mT) and not found.diagonal(dim1=1, dim2=2).any()
    assert not distances(x).diagonal(offset=20, dim1=1, dim2=2).any()
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(x), exact.float(), atol=1e-6, rtol=1e-6)


def test_half_precision_is_clustered_in_fp32():
    x = torch.randn(2, 50, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert k_medoids(x, 9).medoids.equal(k_medoids(x.float(), 9).medoids)


def test_bad_input():
    x = torch.randn(1, 6, 4)
    for said, call in (
        ("at least one cluster", lambda: k_medoids(x, 0)),
        ("at least one cluster", lambda: k_medoids(x, 2, iterations=0)),
        ("metric is one of", lambda: k_medoids(x, 2, metric="hamming")),
        ("graph is one of", lambda: affinity(x, graph="ring")),
        ("sigma is a positive", lambda: affinity(x, sigma=0.0)),
        ("sigma is a positive", lambda: affinity(x, sigma="mean")),
        ("algorithm is one of", lambda: join_segments(x, 1, 1, 2, algorithm="magic")),
        ("do not divide", lambda: join_segments(x.repeat(3, 1, 1), 2, 1, 2)),
        ("one entry each", lambda: events_of([4, 4], [2], 2)),
        ("only become fewer", lambda: events_of([4, 4], [2, 3], 2)),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_median_width_joins_tokens_of_any_scale():
    x = 1e3 * torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(3))
    assert affinity(x, graph="heat").equal(torch.eye(30)[None])
    small = affinity(x / 1e3, graph="heat", sigma="median")
    torch.testing.assert_close(affinity(x, graph="heat", sigma="median"), small, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("frames", "segments"), [(12, 4), (12, 5), (7, 3), (3, 8)])
def test_segments_take_every_frame_once(frames, segments):
    frame, real = frames_of_segments(frames, segments)
    assert len(frame) == min(segments, frames)
    assert frame[real].equal(torch.arange(frames))


@pytest.mark.parametrize("algorithm", ["kmedoids", "spectral", "sampling"])
def test_padding_frames_take_no_part(algorithm):
    """A clip of seven frames padded to twelve gives what its own frames give."""
    x = torch.randn(12, 1 + 9, 6, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(12)[None] < 7
    options = {"algorithm": algorithm, **({"sigma": "median"} if algorithm == "spectral" else {})}
    padded = join_segments(x, 12, 4, 5, mask=mask, **options)
    assert padded.valid.tolist() == [[True, True, False, False]]
    assert padded.hidden.shape == (4, 6, 6)
    other = x.clone()
    other[7:] = 50.0
    assert join_segments(other, 12, 4, 5, mask=mask, **options).hidden[:3].equal(padded.hidden[:3])
    alone = join_segments(x[6:7], 1, 1, 5, **options)
    torch.testing.assert_close(padded.hidden[2:3], alone.hidden)
    assert (padded.frame[2] == 6).all()


def test_a_segment_with_just_enough_real_patches_takes_those():
    x = torch.randn(2, 1 + 9, 6, generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[True, False]])
    for algorithm in ("kmedoids", "spectral", "sampling"):
        joined = join_segments(x, 2, 1, 9, mask=mask, algorithm=algorithm)
        assert joined.hidden[0].equal(x[0]), algorithm


def test_uneven_segments_are_sampled_without_repeats():
    """Seven frames in three segments: the first has two frames, which stand in three places."""
    x = torch.randn(7, 1 + 9, 6, generator=torch.Generator().manual_seed(4))
    joined = join_segments(x, 7, 3, 18, algorithm="sampling")
    assert joined.hidden[0, 1:].equal(x[:2, 1:].flatten(0, 1))
    place = joined.frame * 9 + joined.patch
    assert (place[:, 1:] > place[:, :-1]).all()


def test_the_window_of_the_spectral_graph_leaves_padding_out():
    x = torch.randn(2, 1 + 16, 4, generator=torch.Generator().manual_seed(6))
    options = {"algorithm": "spectral", "neighbours": 9, "window": space_time_window(2, 4, 4, space=3, time=3)}
    near, free = (join_segments(x, 2, 1, 6, **o).clusters for o in (options, {**options, "window": None}))
    assert not near.medoids.equal(free.medoids)
    padded = join_segments(x, 2, 1, 6, mask=torch.tensor([[True, False]]), **options)
    alone = join_segments(x[:1], 1, 1, 6, **{**options, "window": space_time_window(1, 4, 4, space=3, time=3)})
    assert padded.hidden.equal(alone.hidden)


def test_centres_know_their_place_and_carry_gradients():
    x = torch.randn(8, 1 + 9, 6, generator=torch.Generator().manual_seed(5), requires_grad=True)
    joined = join_segments(x, 4, 2, 5)
    for row in range(4):
        video = row // 2
        for place in range(5):
            source = x[video * 4 + joined.frame[row, place], 1 + joined.patch[row, place]]
            assert source.equal(joined.hidden[row, 1 + place])
    joined.hidden[:, 1:].sum().backward()
    assert x.grad[:, 1:].sum() == joined.hidden[:, 1:].numel() and not x.grad[:, :1].any()


def test_towers_without_cls():
    x = torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(6))
    joined = join_segments(x, 4, 2, 5, prefix=0)
    with_cls = join_segments(torch.cat([x.mean(1, keepdim=True), x], 1), 4, 2, 5)
    assert joined.hidden.equal(with_cls.hidden[:, 1:])


def test_sampling():
    assert sampled(torch.tensor([10, 4]), 4).tolist() == [[1, 3, 6, 8], [0, 1, 2, 3]]
    torch.manual_seed(0)
    drawn = sampled(torch.full((50,), 10), 5, random=True)
    assert (drawn // 2).equal(torch.arange(5).expand(50, -1)) and drawn.unique(dim=0).shape[0] > 1


def test_spectral_finds_groups():
    centre = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    x = centre.repeat_interleave(6, 0) + 0.1 * torch.randn(18, 2, generator=torch.Generator().manual_seed(7))
    found = spectral_medoids(x[None], 3, neighbours=5)
    assert found.assign[0].tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_video_embedding_counts_valid_segments():
    features = torch.randn(4, 8, generator=torch.Generator().manual_seed(8))
    both = video_embedding(features, torch.tensor([[True, False], [True, True]]))
    torch.testing.assert_close(both[0], features[0] / features[0].norm())
    mean = torch.nn.functional.normalize(features[2:], dim=-1).mean(0)
    torch.testing.assert_close(both[1], mean / mean.norm())
    none = video_embedding(features, torch.zeros(2, 2, dtype=torch.bool))
    assert none.isfinite().all()
