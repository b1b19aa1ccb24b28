# SPDX-License-Identifier: Apache-2.0
"""A cache that goes on under another method, under a method for the first time, or under none."""

from __future__ import annotations

import copy

import pytest
import torch
from models import IMAGE, PAD, cached, prompts, tiny_llava

import vlmcompress

N = 36
GREEDY = dict(
    max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE, PAD], return_dict_in_generate=True, output_logits=True
)
SPECS = {"one": [[5, "image", 7]], "padded": [[25, "image", 7], [2, "image", 3]]}


def turn(model, inputs, first, new: int = 3):
    """A second generation on the cache of ``first``, with ``new`` - 1 tokens of the user."""
    rows = len(inputs["input_ids"])
    asked = torch.randint(4, 90, (rows, new - 1), generator=torch.Generator().manual_seed(3))
    full = torch.cat([first.sequences, asked], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, full.shape[1] - inputs["input_ids"].shape[1]), value=1)
    return model.generate(input_ids=full, attention_mask=mask, **cached(first), **GREEDY)


@pytest.fixture
def model():
    return tiny_llava(eos_token_id=None)


@pytest.mark.parametrize(("name", "share"), [("a2sf", 0.5), ("keyformer", 0.5), ("h2o", 0.5)])
@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_a_share_is_of_all_that_a_cache_holds(model, name, share, spec):
    inputs = prompts(SPECS[spec], N)
    first = model.generate(**inputs, **GREEDY)
    options = {"heavy": share, "recent": 0} if name == "h2o" else {"budget": share}
    with vlmcompress.compress(model, name, **options):
        cache = turn(model, inputs, first).past_key_values
    held = inputs["attention_mask"].sum(1) + 6 + 2  # the answer and the second question
    for layer in cache.layers:
        real = torch.full((len(held),), layer.keys.shape[2]) if layer.valid is None else layer.valid[:, 0].sum(1)
        assert real.sub(held * share).abs().max() <= 1


@pytest.mark.parametrize("new", [1, 3])
@torch.no_grad()
def test_another_method_starts_with_empty_books(model, new):
    """It neither ranks by the scores nor keeps to the budgets of the method before."""
    inputs = prompts(SPECS["one"], N)
    with vlmcompress.compress(model, "h2o", heavy=20, recent=10):
        first = model.generate(**inputs, **GREEDY)
    blank = copy.deepcopy(first)
    for layer in cached(blank).popitem()[1].layers:
        layer.books, layer.memory = {}, {}
    with vlmcompress.compress(model, "a2sf", budget=8, alpha=0.5):
        found, expected = turn(model, inputs, first, new), turn(model, inputs, blank, new)
    assert [layer.keys.shape[2] for layer in found.past_key_values.layers] == [8] * 4
    for mine, its in zip(found.logits, expected.logits, strict=True):
        assert mine.equal(its)


@torch.no_grad()
def test_the_same_method_goes_on(model):
    """Also when it was taken off and put on again between the turns."""
    inputs = prompts(SPECS["padded"], N)
    options = {"heavy": 8, "recent": 4}
    with vlmcompress.compress(model, "h2o", **options):
        expected = turn(model, inputs, model.generate(**inputs, **GREEDY))
    with vlmcompress.compress(model, "h2o", **options):
        first = model.generate(**inputs, **GREEDY)
    with vlmcompress.compress(model, "h2o", **options):
        found = turn(model, inputs, first)
    for mine, its in zip(found.logits, expected.logits, strict=True):
        assert mine.equal(its)


@pytest.mark.parametrize("before", [None, "h2o"])
@torch.no_grad()
def test_votes_need_keys_from_the_start(model, before):
    inputs = prompts(SPECS["one"], N)
    if before:
        with vlmcompress.compress(model, before):
            first = model.generate(**inputs, **GREEDY)
    else:
        first = model.generate(**inputs, **GREEDY)
    options = {"select": 6, "sinks": 2, "local": 4}
    with vlmcompress.compress(model, "tokenselect", **options), pytest.raises(ValueError, match="vote='rotated'"):
        turn(model, inputs, first)
    with vlmcompress.compress(model, "tokenselect", **options, vote="rotated"):
        turn(model, inputs, first)


#: on a padded batch the stock model would see entries that are none, or miss some; see :meth:`Logical.check_led`
LEFT_BEHIND = {
    "fewer in one row": ("a2sf", {"budget": 0.3}, ["padded"]),
    "hidden": ("h2o", {"heavy": 0.2, "recent": 0.2, "masked": True}, ["one", "padded"]),
    "other positions": ("vtc-cls", {"keep": 9}, ["one", "padded"]),
    "uneven layers": ("fastv", {"keep": 9}, ["one", "padded"]),
}


@pytest.mark.parametrize(("case", "spec"), [(case, spec) for case, row in LEFT_BEHIND.items() for spec in row[2]])
@torch.no_grad()
def test_the_stock_model_refuses_what_it_would_read_wrongly(model, case, spec):
    """After ``remove``; the cache is left as it was, so that a compressed model can go on with it."""
    name, options, _ = LEFT_BEHIND[case]
    inputs = prompts(SPECS[spec], N)
    with vlmcompress.compress(model, name, **options):
        first = model.generate(**inputs, **GREEDY)
        expected = turn(model, inputs, copy.deepcopy(first))
    with pytest.raises(ValueError, match="stock model would read it wrongly"):
        turn(model, inputs, first)
    with vlmcompress.compress(model, name, **options):
        found = turn(model, inputs, first)
    assert found.sequences.equal(expected.sequences)


@pytest.mark.parametrize(("name", "options"), [("h2o", {"heavy": 8, "recent": 4}), ("grid", {"keep": 9})])
@torch.no_grad()
def test_the_stock_model_goes_on_with_the_rest(model, name, options):
    """Where positions and masks fit: as a compressed model that lets nothing go any more."""
    inputs = prompts(SPECS["one"], N)
    with vlmcompress.compress(model, name, **options, positions="original"):
        first = model.generate(**inputs, **GREEDY)
    with vlmcompress.compress(model, "lazyeviction", budget=10**6):
        expected = turn(model, inputs, copy.deepcopy(first))
    for mine, its in zip(turn(model, inputs, first).logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_removal_while_generating(model):
    """The steps behind it are the stock model's, or it is refused; the next answer is the stock model's in any case."""
    inputs = {spec: prompts(rows, N) for spec, rows in SPECS.items()}
    stock = model.generate(**inputs["one"], **GREEDY)
    for spec, options in (("one", {"heavy": 8, "recent": 4}), ("padded", {"heavy": 0.3, "recent": 0.1})):
        handle = vlmcompress.compress(model, "h2o", **options)
        steps = []

        def off_after_two(ids, scores, steps=steps, handle=handle):
            steps.append(ids)
            if len(steps) == 2:
                handle.remove()
            return scores

        def run(spec=spec, watch=off_after_two):
            return model.generate(**inputs[spec], **GREEDY, logits_processor=[watch])

        if spec == "one":
            assert [layer.keys.shape[2] for layer in run().past_key_values.layers] == [12 + 4] * 4
        else:
            with pytest.raises(ValueError, match="stock model would read it wrongly"):
                run()
        assert model.generate(**inputs["one"], **GREEDY).sequences.equal(stock.sequences)
