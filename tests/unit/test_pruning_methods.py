# SPDX-License-Identifier: Apache-2.0
"""TransPrune and MustDrop against the slow reference, and what every method owes: batches, padding, beams, bad input."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, cached, prompts, row_alone, tiny_llava
from reference import cleared, embeddings, entering, real_slots, reference, shown

import vlmcompress

N, DEPTH, STEPS = 36, 6, 4
GREEDY = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE])
CLOSE = dict(atol=1e-4, rtol=1e-4)
STAGES = {"layers": (1, 2, 4), "fractions": (0.8, 0.5, 0.2)}
FILTERS = {"layers": (0, 2, 3), "gamma": 0.03, "alpha": 0.06}
METHODS = {
    "transprune": ("transprune", STAGES),
    "transprune-keep": ("transprune", {"keep": 20}),
    "transprune-ttv": ("transprune", {**STAGES, "alpha": 1.0, "direction": "abs"}),
    "transprune-none": ("transprune", {**STAGES, "fractions": (0.5, 0.5, 0.0)}),
    "mustdrop": ("mustdrop", {**FILTERS, "merge": False}),
    "mustdrop-merge": ("mustdrop", {**FILTERS, "similarity": 0.4}),
    "mustdrop-keep": ("mustdrop", {"layers": (0, 2, 3), "keep": 14, "similarity": 0.4}),
    "mustdrop-cache": ("mustdrop", {**FILTERS, "clear_cache": False}),
}
PROMPTS = {
    "one": [[5, "image", 7]],
    "ragged": [[5, "image", 7], [2, "image", 3], [9, "image", 12]],
    "two images": [[2, "image", 3, "image", 4], [3, "image", 2]],
    "image first, and a text": [["image", 6], [9]],
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_llava(attention=request.param, eos_token_id=None, num_hidden_layers=DEPTH)


def prefill(model, handle, inputs):
    """Ledger, entering states and logits of one plain forward pass, and of one without a cache."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = {}

    def call():
        out["logits"] = model(**inputs, position_ids=positions).logits

    embeds = entering(model, call)
    ledger = handle.last
    torch.testing.assert_close(model(**inputs, position_ids=positions, use_cache=False).logits, out["logits"], **CLOSE)
    return ledger, embeds, out["logits"]


def expected(model, ledger, embeds, inputs, policy, options, later=None):
    """Reference logits in slots of the first frame, and what a later token sees."""
    frame, masks = ledger.frames[0], shown(ledger)
    valid = real_slots(frame)
    behind = masks
    if options.get("name") == "mustdrop" and options.get("clear_cache", True):
        behind = cleared(masks, options["layers"][0])
    return reference(
        model, embeds, masks, valid, frame.positions, policy=policy, later=later, later_masks=behind
    ), masks  # fmt: skip


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("which", METHODS)
@torch.no_grad()
def test_equals_reference(model, which, prompt, policy):
    (name, options), inputs = METHODS[which], prompts(PROMPTS[prompt], N)
    stock = embeddings(model, inputs)
    with vlmcompress.compress(model, name, positions=policy, **options) as handle:
        ledger, embeds, logits = prefill(model, handle, inputs)
        answer = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True)
    new = answer.sequences[:, inputs["input_ids"].shape[1] :]
    index = ledger.frames[0].index
    if ledger.selection is None:
        torch.testing.assert_close(embeds, stock)
    want, masks = expected(model, ledger, embeds, inputs, policy, {**options, "name": name}, new[:, :-1])
    assert ledger.layer_tokens[-1] < ledger.layer_tokens[0]
    here, columns = masks[-1], index.shape[1]
    got = logits.gather(1, index[..., None].expand(-1, -1, logits.shape[-1]))
    torch.testing.assert_close(got[here], want[:, :columns][here], **CLOSE)
    torch.testing.assert_close(torch.stack(answer.logits, 1), want[:, columns - 1 :], **CLOSE)


@pytest.mark.parametrize("which", METHODS)
@torch.no_grad()
def test_beams_equal_reference(model, which):
    (name, options), inputs = METHODS[which], prompts(PROMPTS["ragged"], N)
    policy = "contiguous"
    with vlmcompress.compress(model, name, **options) as handle:
        ledger, embeds, _ = prefill(model, handle, inputs)
        beams = model.generate(
            **inputs, **GREEDY, num_beams=3, num_return_sequences=3, output_scores=True, return_dict_in_generate=True
        )
        for row, sample in enumerate(handle.last.samples):
            for image, alone in zip(sample.images, ledger.samples[row // 3].images, strict=True):
                assert all(image.kept_at(layer).equal(alone.kept_at(layer)) for layer in range(DEPTH))
    for beam in range(3):
        new = beams.sequences[beam::3, inputs["input_ids"].shape[1] :]
        want, _ = expected(model, ledger, embeds, inputs, policy, {**options, "name": name}, new[:, :-1])
        steps = want[:, -STEPS:].log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
        torch.testing.assert_close(beams.sequences_scores[beam::3], steps / STEPS, **CLOSE)


@pytest.mark.parametrize("which", METHODS)
@pytest.mark.parametrize("policy", ["original", "contiguous"])
@torch.no_grad()
def test_second_turn_equals_reference(model, which, policy):
    (name, options), inputs = METHODS[which], prompts([[5, "image", 7], [3, "image", 2]], N)
    more = torch.randint(4, 97, (2, 3), generator=torch.Generator().manual_seed(3))
    length = inputs["input_ids"].shape[1]
    with vlmcompress.compress(model, name, positions=policy, **options) as handle:
        ledger, embeds, _ = prefill(model, handle, inputs)
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        full = torch.cat([first.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, full.shape[1] - length, dtype=torch.long)], 1)
        again = model.generate(
            input_ids=full, attention_mask=mask, **cached(first), **GREEDY, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    later = again.sequences[:, length:-1]
    want, _ = expected(model, ledger, embeds, inputs, policy, {**options, "name": name}, later)
    torch.testing.assert_close(torch.stack(again.logits, 1), want[:, -STEPS:], **CLOSE)


@pytest.mark.parametrize("which", METHODS)
@torch.no_grad()
def test_batched_equals_single_and_padding_does_not_matter(model, which):
    name, options = METHODS[which]
    spec = [[5, "image", 7], [2, "image", 3, "image", 2], [8, "image", 4]]
    left, right = prompts(spec, N), prompts(spec, N, side="right")
    with vlmcompress.compress(model, name, **options) as handle:
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp_min(0) for x in (left, right)]
        batch_left = model(**left, position_ids=positions[0]).logits
        ledger = handle.last
        batch_right = model(**right, position_ids=positions[1]).logits
        for row in range(len(spec)):
            alone = row_alone(left, spec, row)
            length = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for kept, single in zip(ledger.samples[row].images, handle.last.samples[0].images, strict=True):
                assert all(kept.kept_at(layer).equal(single.kept_at(layer)) for layer in range(DEPTH))
                torch.testing.assert_close(kept.scores(), single.scores(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(batch_left[row, -length:], logits, **CLOSE)
            torch.testing.assert_close(batch_right[row, :length], logits, **CLOSE)
