# SPDX-License-Identifier: Apache-2.0
"""PRIOR: the worked example of its formula, its properties, the stock forward pass and the scoring pass."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, prompts, tiny_llava
from transformers.loss.loss_utils import ForCausalLMLoss

from vlmcompress.training.prior import CachedWeights, PriorLoss, prior_loss, quantile, reference_weights

VOCAB = 11


def batch(rows=3, length=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, (rows, length), generator=g)
    labels[:, :2] = -100
    labels[1, 5:] = -100
    weights = torch.rand(rows, length, generator=g).masked_fill(labels == -100, 0)
    return torch.randn(rows, length, VOCAB, generator=g), labels, weights


@pytest.mark.parametrize(
    ("alpha", "factors", "total"),
    [(0, (1, 1, 1, 1), 4.25), (0.5, (0.6105, 1.3651, 1.8314, 0.1930), 6.9911),
     (1, (0.2649, 1.3245, 2.3841, 0.0265), 8.5311), (2, (0.0374, 0.9345, 3.0278, 0.0004), 10.0253)],
)  # fmt: skip
def test_worked_example(alpha, factors, total):
    p = torch.tensor([[0.9, 0.5, 0.1, 0.99]])
    found = PriorLoss(alpha=alpha).factors(1 - p, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(found, torch.tensor([factors]).float(), atol=6e-5, rtol=0)
    # logits whose losses are the example's
    losses = torch.tensor([0.2, 1.0, 3.0, 0.05])
    logits = torch.zeros(1, 5, 2)
    logits[0, :4, 0] = -torch.log(torch.expm1(losses))
    labels, weights = torch.tensor([[-100, 0, 0, 0, 0]]), torch.nn.functional.pad(1 - p, (1, 0))
    loss = PriorLoss(alpha=alpha)(logits, labels, 2, token_weights=weights)
    assert float(loss) * 4 == pytest.approx(total, abs=2e-3)
    assert float(PriorLoss(alpha=alpha)(logits, labels, 2, num_items_in_batch=2, token_weights=weights)) * 2 == (
        pytest.approx(total, abs=2e-3)
    )


@pytest.mark.parametrize("items", [None, torch.tensor(30)])
def test_plain_loss_exactly(items):
    logits, labels, weights = batch()
    stock = ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=items)
    for loss, given in ((prior_loss, None), (PriorLoss(alpha=0), weights), (prior_loss, (labels != -100).float())):
        torch.testing.assert_close(loss(logits, labels, VOCAB, items, given), stock, atol=1e-6, rtol=1e-6)


def test_captions_keep_their_weight_and_scale_does_not_matter():
    _, labels, weights = batch()
    here, shifted = labels[:, 1:] != -100, weights[:, 1:]
    for loss in (PriorLoss(), PriorLoss(alpha=2.0), PriorLoss(smooth=0.3)):
        factors = loss.factors(shifted, here)
        torch.testing.assert_close(factors.sum(1), here.sum(1).float())
        torch.testing.assert_close(loss.factors(shifted * 0.25, here), factors)
        assert not factors[~here].any()
    assert not PriorLoss(normalize="none").factors(shifted, here).sum(1).allclose(here.sum(1).float())
    whole = PriorLoss(normalize="batch").factors(shifted, here)
    assert float(whole.sum()) == pytest.approx(int(here.sum())) and not whole.sum(1).allclose(here.sum(1).float())
    smooth = PriorLoss(smooth=1.0).factors(shifted, here)
    torch.testing.assert_close(smooth, here.float())


def test_edges():
    logits, labels, weights = batch()
    certain = weights.clone()
    certain[0] = 0  # the reference is certain of the whole caption: plain for this one
    factors = PriorLoss().factors(certain[:, 1:], labels[:, 1:] != -100)
    assert factors[0].equal((labels[0, 1:] != -100).float())
    labels[2] = -100  # a caption without a supervised token contributes nothing
    alone = prior_loss(logits[:2], labels[:2], VOCAB, token_weights=weights[:2])
    torch.testing.assert_close(prior_loss(logits, labels, VOCAB, token_weights=weights), alone)
    assert float(prior_loss(logits, labels.fill_(-100), VOCAB, token_weights=weights)) == 0
    over = torch.tensor([[1.0000001, 0.5]])
    assert PriorLoss(alpha=0.5).factors(over, torch.ones(1, 2, dtype=torch.bool)).isfinite().all()
    high = PriorLoss(cap=0.5).factors(torch.tensor([[0.9, 0.5, 0.25]]), torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(high, torch.tensor([[1.2, 1.2, 0.6]]))


def test_no_gradient_reaches_the_reference():
    logits, labels, weights = batch()
    weights.requires_grad_()
    prior_loss(logits.requires_grad_(), labels, VOCAB, token_weights=weights).backward()
    assert weights.grad is None and logits.grad.abs().sum() > 0


def test_micro_batches_add_up():
    logits, labels, weights = batch(rows=8)
    items = (labels[:, 1:] != -100).sum()
    whole = prior_loss(logits, labels, VOCAB, items, weights)
    parts = sum(
        prior_loss(logits[i : i + 2], labels[i : i + 2], VOCAB, items, weights[i : i + 2]) for i in range(0, 8, 2)
    )
    torch.testing.assert_close(parts, whole)


def test_packed_captions_equal_separate_rows():
    logits, labels, weights = batch(rows=2, length=6)
    packed = [x.reshape(1, 12, *x.shape[2:]) for x in (logits, labels, weights)]
    segments = torch.arange(2).repeat_interleave(6)[None]
    together = prior_loss(packed[0], packed[1], VOCAB, token_weights=packed[2], segment_ids=segments)
    torch.testing.assert_close(together, prior_loss(logits, labels, VOCAB, token_weights=weights))
    assert not prior_loss(packed[0], packed[1], VOCAB, token_weights=packed[2]).allclose(together)


def test_stock_forward_passes_the_column_on():
    model = tiny_llava()
    inputs = prompts([[4, "image", 6], [2, "image", 8]], 36, side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    stock = model(**inputs, labels=labels).loss
    model.loss_function = prior_loss
    torch.testing.assert_close(model(**inputs, labels=labels).loss, stock)
    ones = torch.ones(labels.shape)
    torch.testing.assert_close(model(**inputs, labels=labels, token_weights=ones).loss, stock)
    weights = torch.rand(labels.shape)
    got = model(**inputs, labels=labels, token_weights=weights)
    torch.testing.assert_close(got.loss, prior_loss(got.logits, labels, 97, token_weights=weights))
    assert not got.loss.allclose(stock)


@torch.no_grad()
def test_reference_probabilities_are_those_of_the_text_alone():
    model = tiny_llava()
    inputs = prompts([[4, "image", 6], [2, "image", 3]], 36)
    labels = inputs["input_ids"].clone()
    labels[inputs["input_ids"] == IMAGE] = -100
    labels[:, :-3] = -100
    found = reference_weights(model, inputs["input_ids"], labels, IMAGE, inputs["attention_mask"])
    assert not found[labels == -100].any()
    for row in range(2):
        real = inputs["attention_mask"][row].bool() & (inputs["input_ids"][row] != IMAGE)
        text = inputs["input_ids"][row][real][None]
        p = model(input_ids=text).logits[0, :-1].softmax(-1).gather(1, text[0, 1:, None])[:, 0]
        torch.testing.assert_close(found[row, -3:], 1 - p[-3:], atol=1e-5, rtol=1e-4)


def test_cache_on_disk(tmp_path):
    rows = [torch.rand(5), torch.rand(0), torch.rand(9)]
    CachedWeights(rows).save(tmp_path / "weights.safetensors")
    again = CachedWeights.load(tmp_path / "weights.safetensors")
    assert [len(again[i]) for i in range(len(again))] == [5, 0, 9]
    for i in (0, 2):
        assert (again[i].float() / 255 - rows[i]).abs().max() <= 0.002
    assert quantile(again, 0.5) == pytest.approx(float(torch.cat(rows).quantile(0.5)), abs=0.005)
    logits, labels, weights = batch()
    bytes_ = (weights * 255).round().to(torch.uint8)
    torch.testing.assert_close(
        prior_loss(logits, labels, VOCAB, token_weights=bytes_),
        prior_loss(logits, labels, VOCAB, token_weights=bytes_.float() / 255),
    )


def test_bad_input(tmp_path):
    for options, message in (({"alpha": -1}, "alpha is at least 0"), ({"normalize": "row"}, "normalize is one of"),
                             ({"smooth": 2}, "shares from 0 to 1"), ({"cap": 0}, "shares from 0 to 1")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            PriorLoss(**options)
    logits, labels, weights = batch()
    with pytest.raises(ValueError, match="they go together, token by token"):
        prior_loss(logits, labels, VOCAB, token_weights=weights[:, :-1])
    with pytest.raises(ValueError, match=r"no file .* with cached reference probabilities"):
        CachedWeights.load(tmp_path / "none")
