# SPDX-License-Identifier: Apache-2.0
"""ToDRE's order of tokens: cosines taken ahead in blocks give what one step at a time gives, ties included."""

from __future__ import annotations

import pytest
import torch

from vlmcompress.ops import diversity
from vlmcompress.ops.diversity import diverse_order, unit_vectors


def plain(x, pivot, steps, rule):
    """One row, all cosines at once, in fp64."""
    cosine = unit_vectors(x, torch.float64) @ unit_vectors(x, torch.float64).T
    order = [int(pivot)]
    while len(order) < steps:
        seen = cosine[order]
        score = seen.sum(0) if rule == "maxsum" else seen.amax(0)
        score[order] = torch.inf
        order.append(int(score.argmin()))
    return order


def features(seed, batch, n, width):
    """Clusters, so that rankings move, and a common direction, as projected tokens have."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, width, generator=generator)
    pick = torch.randint(0, 12, (batch, n), generator=generator)
    return centres[pick] + 0.5 * torch.randn(batch, n, width, generator=generator) + 0.6


@pytest.mark.parametrize("rule", ["maxsum", "kcenter"])
@pytest.mark.parametrize(("n", "steps"), [(20, 20), (33, 9), (400, 60)])
def test_order_is_that_of_all_cosines(rule, n, steps):
    x, pivot = features(n, 3, n, 24), torch.tensor([0, 5, n - 1])
    order = diverse_order(x, pivot, steps, rule=rule)
    assert [plain(row, p, steps, rule) for row, p in zip(x, pivot, strict=True)] == order.tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rule", ["maxsum", "kcenter"])
def test_equal_tokens_go_by_their_number(rule, seed):
    """Each token stands four times, at places that fall into different tiles of a product."""
    n = 45 + seed
    part = features(seed, 1, n, 24 + 9 * seed)
    x = torch.cat([part] * 4, 1)
    order = diverse_order(x, torch.tensor([0]), 2 * n, rule=rule)[0].tolist()
    for number in range(n):
        places = [token for token in order if token % n == number]
        assert places == sorted(places)


def test_batched_equals_alone_with_padding():
    x = features(2, 3, 150, 32)
    candidates = torch.arange(150) < torch.tensor([[150], [90], [120]])
    together = diverse_order(x, torch.tensor([3, 4, 5]), 50, candidates=candidates)
    for row, n in enumerate((150, 90, 120)):
        alone = diverse_order(x[row : row + 1, :n], torch.tensor([3 + row]), 50)
        assert alone[0].equal(together[row])


@pytest.mark.parametrize("rule", ["maxsum", "kcenter"])
def test_more_equal_tokens_than_are_looked_at(rule):
    """Four tokens, each 150 times: of equal ones the first that is left, and everything in the end."""
    x = features(2, 1, 4, 24).repeat(1, 150, 1)
    order = diverse_order(x, torch.tensor([0]), 600, rule=rule)[0].tolist()
    assert sorted(order) == list(range(600))
    for number in range(4):
        places = [token for token in order if token % 4 == number]
        assert places == sorted(places)


@pytest.mark.parametrize("rule", ["maxsum", "kcenter"])
def test_few_cosines_are_taken_in_vain(rule, monkeypatch):
    """The point of it: far from all cosines are taken, and a third of them or more are those of the 100 chosen tokens."""
    made = []
    build = diversity._Lookahead.__init__

    def noted(self, *args):
        build(self, *args)
        made.append(self)

    monkeypatch.setattr(diversity._Lookahead, "__init__", noted)
    diverse_order(features(4, 2, 1000, 64), torch.tensor([0, 1]), 100, rule=rule)
    assert [99 <= len(one.cosines) < 300 for one in made] == [True, True]


def test_looking_ahead_is_as_one_step_at_a_time(monkeypatch):
    """Where the next token cannot be told ahead: directions without any order, of few dimensions."""
    x = torch.randn(2, 700, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    ahead = diverse_order(x, torch.tensor([3, 600]), 200)
    monkeypatch.setattr(diversity._Lookahead, "_best", lambda self, chosen, left: [chosen])
    assert diverse_order(x, torch.tensor([3, 600]), 200).equal(ahead)


def test_unknown_rule():
    with pytest.raises(ValueError, match="rule is"):
        diverse_order(features(0, 1, 5, 4), torch.tensor([0]), 2, rule="far")
