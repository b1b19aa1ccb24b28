# SPDX-License-Identifier: Apache-2.0
"""Appending and evicting in place gives what copying gives, whoever else had a hand on the cache in between."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from vlmcompress.hooks.cache import PrunableLayer, picks
from vlmcompress.hooks.growing import SPARE


def token(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, 3, 1, 4, generator=generator).unbind()


def layers(n=6):
    keys, values = torch.randn(2, 2, 3, n, 4, generator=torch.Generator().manual_seed(9)).unbind()
    found = PrunableLayer(), DynamicLayer()
    for layer in found:
        layer.update(keys, values)
    return found


def same(ours, stock):
    assert ours.keys.equal(stock.keys) and ours.values.equal(stock.values)


def grow(pair, seeds, batch=2):
    for seed in seeds:
        for layer in pair:
            layer.update(*token(seed, batch))
        same(*pair)


def leave_out(pair, seed):
    """Evict one entry per head from ours, and gather the stock layer."""
    ours, stock = pair
    n = ours.stored
    gone = torch.randint(0, n, (2, 3, 1), generator=torch.Generator().manual_seed(seed))
    keep = torch.arange(n - 1).expand(2, 3, -1)
    keep = keep + (keep >= gone)
    ours.evict(keep, None)
    index = keep[..., None].expand(-1, -1, -1, 4)
    stock.keys, stock.values = stock.keys.gather(2, index), stock.values.gather(2, index)
    same(*pair)


@torch.no_grad()
def test_tokens_come_and_entries_leave_in_one_place():
    pair = layers()
    grow(pair, [0])
    place = pair[0].keys.data_ptr()
    for seed in range(1, 3 * SPARE):
        grow(pair, [seed])
        leave_out(pair, seed)
    assert pair[0].keys.data_ptr() == place and pair[0].stored == 7
    assert pair[0].get_seq_length() == 6 + 3 * SPARE


@torch.no_grad()
def test_storage_is_laid_out_anew_when_it_is_full():
    pair = layers()
    grow(pair, range(3 * SPARE))
    assert pair[0].keys.untyped_storage().nbytes() <= (pair[0].stored + SPARE) * 2 * 3 * 4 * 4


@torch.no_grad()
@pytest.mark.parametrize("act", [
    lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
    lambda layer: layer.crop(-2),
], ids=["beams", "select", "crop"])  # fmt: skip
def test_others_change_the_cache_in_between(act):
    pair = layers()
    grow(pair, [0, 1, 2])
    for layer in pair:
        act(layer)
    grow(pair, [3, 4])
    leave_out(pair, 5)
    grow(pair, [6])


@torch.no_grad()
def test_a_copy_is_a_cache_of_its_own():
    pair = layers()
    grow(pair, [0, 1])
    twin, before = copy.deepcopy(pair[0]), pair[0].keys.clone()
    twin.update(*token(7))
    twin.evict(torch.arange(1, twin.stored)[None, None], None)
    assert pair[0].keys.equal(before)
    grow(pair, [2])


def test_gradients_go_through_tensors_of_their_own():
    pair = layers()
    states = token(0)[0].requires_grad_()
    for layer in pair:
        layer.update(states, states)
    first = pair[0].keys
    more = token(1)[0].requires_grad_()
    pair[0].update(more, more)
    assert first.shape[2] == 7 and pair[0].keys.data_ptr() != first.data_ptr()
    pair[0].keys.sum().backward()
    assert states.grad.equal(torch.ones_like(states)) and more.grad.equal(torch.ones_like(more))


def test_storage_made_for_inference_is_not_written_to_afterwards():
    pair = layers()
    with torch.inference_mode():
        grow(pair, [0, 1])
    with torch.no_grad():
        grow(pair, [2, 3])
        leave_out(pair, 4)


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("held", [
    lambda x: x,
    lambda x: torch.nn.functional.pad(x, (0, 0, 0, 5))[:, :, : x.shape[2]],
    lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    lambda x: x[:, :1].expand_as(x),
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: x.mT.contiguous().mT,
    lambda x: x[..., :3],
], ids=["whole", "room", "heads", "one head", "slots first", "columns", "narrow"])  # fmt: skip
def test_rows_are_picked_from_any_view(n, heads, held):
    generator = torch.Generator().manual_seed(n)
    x = held(torch.randn(2, 3, n, 4, generator=generator))
    keep = torch.randint(n, (2, heads, 4), generator=generator)
    index = keep.expand(-1, 3, -1)[..., None].expand(-1, -1, -1, x.shape[3])
    assert picks(x, keep).equal(x.gather(2, index))
