# SPDX-License-Identifier: Apache-2.0
"""The engine against a slow reference: the same model on the full sequence, dropped tokens hidden by a mask, no cache."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, cached, prompts, row_alone, tiny_llava

import vlmcompress

N = 36
#: a random model would otherwise answer with image placeholders
GREEDY = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE])
#: methods whose choice is made before the language model, so that one kept set serves all its layers
ENTRY = [("vtc-cls", {"keep": 9}), ("random", {"keep": 7}), ("grid", {"keep": 8}), ("no-vision", {})]
ALL = [*ENTRY, ("pool", {"keep": 9}), ("resize", {"keep": 9}), ("tome", {"keep": 9}), ("tower-cls", {"keep": 9}),
       ("fastv", {"keep": 9}), ("fastv", {"keep": 9, "window": 2}), ("keep-last", {"budget": 20})]  # fmt: skip
PROMPTS = {
    "one": [[5, "image", 7]],
    "ragged": [[5, "image", 7], [2, "image", 3], [9, "image", 12]],
    "two images": [[2, "image", 3, "image", 4], [3, "image", 2]],
    "image first": [["image", 6]],
    "image last": [[6, "image"]],
    "with text only": [[4, "image", 3], [9]],
}
names = [name + ("-" + "-".join(map(str, o.values())) if o else "") for name, o in ALL]


def dropped_of(handle, ids):
    """[B, S] bool: columns of visual tokens that did not enter."""
    gone = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(handle.last.samples):
        columns = (ids[row] == IMAGE).nonzero()[:, 0].split([i.n_original for i in sample.images])
        for image, place in zip(sample.images, columns, strict=True):
            missing = torch.ones(image.n_original, dtype=torch.bool)
            missing[image.kept] = False
            gone[row, place[missing]] = True
    return gone


def reference(model, inputs, gone, policy, new_ids=None):
    """Logits [B, S, vocab] of the stock model in which ``gone`` columns are invisible."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if new_ids is not None:
        extra = torch.ones_like(new_ids, dtype=torch.bool)
        ids, mask = torch.cat([ids, new_ids], 1), torch.cat([mask, extra], 1)
        gone = torch.cat([gone, ~extra], 1)
    embeds = model.get_input_embeddings()(ids)
    if "pixel_values" in inputs:
        features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
        embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    if policy == "contiguous":
        positions = positions - (gone.long().cumsum(1) - gone.long())
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (mask & ~gone)[:, None]
    seen |= torch.eye(length, dtype=torch.bool)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    states = model.model.language_model(
        inputs_embeds=embeds, attention_mask=additive, position_ids=positions
    ).last_hidden_state
    return model.lm_head(states)


def greedy(model, inputs, gone, policy, steps):
    new = torch.empty(len(gone), 0, dtype=torch.long)
    for _ in range(steps):
        logits = reference(model, inputs, gone, policy, new)
        if new.shape[1] == 0:  # a prompt may end with tokens that left
            there = (inputs["attention_mask"].bool() & ~gone).long()
            last = there.shape[1] - 1 - there.flip(1).argmax(1)
            logits = logits[torch.arange(len(last)), last][:, None]
        new = torch.cat([new, likeliest(logits)], 1)
    return new


def likeliest(logits):
    """[B, 1] the next greedy token."""
    logits = logits[:, -1].clone()
    logits[:, IMAGE] = float("-inf")
    return logits.argmax(-1, keepdim=True)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_llava(attention=request.param, eos_token_id=None)


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("name", "options"), ENTRY)
@torch.no_grad()
def test_entry_equals_reference(model, name, options, prompt, policy):
    inputs = prompts(PROMPTS[prompt], N)
    positions = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)}
    with vlmcompress.compress(model, name, positions=policy, **options) as handle:
        logits = model(**inputs, **positions).logits
        uncached = model(**inputs, **positions, use_cache=False).logits
        gone = dropped_of(handle, inputs["input_ids"])
        new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    expected = reference(model, inputs, gone, policy)
    here = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(logits[here], expected[here], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(uncached, logits, atol=1e-5, rtol=1e-5)
    assert not logits[:, :-1][gone[:, :-1]].any()
    assert new.equal(greedy(model, inputs, gone, policy, 5))


@pytest.mark.parametrize(("name", "options"), ALL, ids=names)
@torch.no_grad()
def test_batched_equals_single_and_padding_does_not_matter(model, name, options):
    spec = [[5, "image", 7], [2, "image", 3, "image", 2], [8, "image", 4]]
    left, right = prompts(spec, N), prompts(spec, N, side="right")
    with vlmcompress.compress(model, name, **options) as handle:
        new = model.generate(**left, **GREEDY)[:, left["input_ids"].shape[1] :]
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp_min(0) for x in (left, right)]
        batch_left = model(**left, position_ids=positions[0]).logits
        records = [[i.kept for i in s.images] for s in handle.last.samples]
        batch_right = model(**right, position_ids=positions[1]).logits
        for row in range(len(spec)):
            alone = row_alone(left, spec, row)
            length = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for kept, single in zip(records[row], handle.last.samples[0].images, strict=True):
                assert kept.equal(single.kept)
            torch.testing.assert_close(batch_left[row, -length:], logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(batch_right[row, :length], logits, atol=1e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, length:].equal(new[row])


@pytest.mark.parametrize(("name", "options"), ALL, ids=names)
@torch.no_grad()
def test_beams_and_second_turn(model, name, options):
    inputs = prompts([[5, "image", 7], [3, "image", 2]], N)
    more = torch.randint(4, 97, (2, 4), generator=torch.Generator().manual_seed(3))
    with vlmcompress.compress(model, name, **options):
        for row in range(2):
            n = int(inputs["attention_mask"][row].sum())
            alone = {"input_ids": inputs["input_ids"][row : row + 1, -n:], "attention_mask": torch.ones(1, n, dtype=torch.long),
                     "pixel_values": inputs["pixel_values"][row : row + 1]}  # fmt: skip
            beams = model.generate(**inputs, num_beams=3, **GREEDY)[row, inputs["input_ids"].shape[1] :]
            assert beams.equal(model.generate(**alone, num_beams=3, **GREEDY)[0, n:])
        # the second turn on the cache of the first equals decoding the same tokens one by one
        first = model.generate(**inputs, return_dict_in_generate=True, **GREEDY)
        full = torch.cat([first.sequences, more], 1)
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(2, full.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)], 1
        )
        again = model.generate(input_ids=full, attention_mask=mask, **cached(first), **GREEDY)
        step = model(**inputs, use_cache=True, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp_min(0))
        position = inputs["attention_mask"].sum(1, keepdim=True)
        tokens = full[:, inputs["input_ids"].shape[1] :]
        grown = inputs["attention_mask"]
        for column in range(tokens.shape[1] + 4):
            grown = torch.cat([grown, torch.ones(2, 1, dtype=torch.long)], 1)
            step = model(
                input_ids=tokens[:, column : column + 1], **cached(step), attention_mask=grown, position_ids=position
            )
            position = position + 1
            if column >= tokens.shape[1] - 1:
                tokens = torch.cat([tokens, likeliest(step.logits)], 1)
    if name != "keep-last":  # which evicts at every step, so that four tokens at once see more than four single ones
        assert again[:, inputs["input_ids"].shape[1] :].equal(tokens)
    assert again.shape[1] == full.shape[1] + 5


@pytest.mark.parametrize("options", [{"keep": N}, {"keep": 1.0}, {"keep": 1000}])
@pytest.mark.parametrize("name", ["vtc-cls", "random", "grid", "pool", "resize", "tome", "tower-cls", "fastv"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_keeping_all_is_bit_identical(model, name, options, side):
    inputs = prompts(PROMPTS["two images"], N, side=side)
    before = model(**inputs).logits
    answer = model.generate(**inputs, **GREEDY)
    with vlmcompress.compress(model, name, **options) as handle:
        assert model(**inputs).logits.equal(before)
        assert model.generate(**inputs, **GREEDY).equal(answer)
        assert handle.last.layer_tokens == [3 * N] * 4


@torch.no_grad()
def test_text_only_prompts_pass_untouched(model):
    inputs = prompts([[9], [5]], N)
    before = model.generate(**inputs, **GREEDY)
    for name, options in ALL:
        with vlmcompress.compress(model, name, **options) as handle:
            if name != "keep-last":
                assert model.generate(**inputs, **GREEDY).equal(before)
            with pytest.raises(ValueError, match="No visual token"):
                handle.report()


@torch.no_grad()
def test_new_image_in_the_second_turn(model):
    first, second = prompts([[4, "image", 3]], N), prompts([[2, "image", 5]], N, seed=5)
    both = torch.cat([first["input_ids"], second["input_ids"]], 1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    for name, options in [("vtc-cls", {"keep": 9}), ("fastv", {"keep": 9})]:
        with vlmcompress.compress(model, name, **options):
            turn = model(**first)
            positions = torch.arange(first["input_ids"].shape[1], both.shape[1])[None]
            turns = model(
                **{**second, "attention_mask": torch.ones_like(both)}, **cached(turn), position_ids=positions
            ).logits
            if name == "vtc-cls":
                at_once = model(input_ids=both, pixel_values=pixels, attention_mask=torch.ones_like(both)).logits
                torch.testing.assert_close(turns, at_once[:, first["input_ids"].shape[1] :], atol=1e-4, rtol=1e-4)
            assert turns.shape[1] == second["input_ids"].shape[1]
