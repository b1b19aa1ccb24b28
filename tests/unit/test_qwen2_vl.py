# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL: images of different sizes in one pack, three-dimensional positions, the merger as a projector."""

from __future__ import annotations

import pytest
import torch
from models_qwen import END, IMAGE, START, VIDEO, prompts_qwen, row_of, tiny_qwen

import vlmcompress

GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, VIDEO, START, END])
SPEC = [[5, (4, 6), 7], [2, (3, 4), 3, (4, 4), 2], [8, (6, 2), 4]]
SAME = [[5, (4, 6), 7], [2, (4, 6), 3, (4, 6), 2], [8, (4, 6), 4]]
ENTRY = [("vtc-cls", {"keep": 5}), ("vtc-cls", {"keep": 0.3}), ("random", {"keep": 5}), ("grid", {"keep": 6})]
FLOWCUT = [("flowcut", {"keep": 4, "variant": variant, "every": 1}) for variant in ("official", "aligned")]
ALL = [*ENTRY, ("no-vision", {}), *FLOWCUT, ("flowcut", {"keep": 0.2, "variant": "aligned"}),
       ("flowcut", {"keep": 4, "llm_layer": None}), ("fastv", {"keep": 5}), ("keep-last", {"budget": 20})]  # fmt: skip
names = [name + "".join(f"-{v}" for v in o.values()) for name, o in ALL]


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_qwen(request.param)


@pytest.mark.parametrize("spec", [SPEC, SAME], ids=["mixed", "same"])
@pytest.mark.parametrize(("name", "options"), ALL, ids=names)
@torch.no_grad()
def test_batched_equals_single_and_padding_does_not_matter(model, name, options, spec):
    left, right = prompts_qwen(spec), prompts_qwen(spec, side="right")
    width = left["input_ids"].shape[1]
    with vlmcompress.compress(model, name, **options) as handle:
        new = model.generate(**left, **GREEDY)[:, width:]
        beams = model.generate(**left, **GREEDY, num_beams=2)[:, width:]
        batch_left = model(**left).logits
        records = [[(i.kept, i.kept_at(3)) for i in s.images] for s in handle.last.samples]
        batch_right = model(**right).logits
        for row in range(len(spec)):
            alone = row_of(left, row)
            length = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for kept, single in zip(records[row], handle.last.samples[0].images, strict=True):
                assert kept[0].equal(single.kept)
                assert kept[1].equal(single.kept_at(3))
            torch.testing.assert_close(batch_left[row, -length:], logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(batch_right[row, :length], logits, atol=1e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, length:].equal(new[row])
            assert model.generate(**alone, **GREEDY, num_beams=2)[0, length:].equal(beams[row])


def reference(model, inputs, gone, positions):
    """Logits of the stock model on the full sequence in which ``gone`` columns are invisible."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], features)
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (mask & ~gone)[:, None] | torch.eye(length).bool()
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    states = model.model.language_model(inputs_embeds=embeds, attention_mask=additive, position_ids=positions)
    return model.lm_head(states.last_hidden_state)


@pytest.mark.parametrize(("name", "options"), [*ENTRY, ("no-vision", {})])
@torch.no_grad()
def test_entry_equals_reference(model, name, options):
    inputs = prompts_qwen(SPEC)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions, _ = model.model.get_rope_index(
        ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=mask
    )
    with vlmcompress.compress(model, name, **options) as handle:
        logits = model(**inputs).logits
        gone = torch.zeros_like(ids, dtype=torch.bool)
        for row, sample in enumerate(handle.last.samples):
            columns = (ids[row] == IMAGE).nonzero()[:, 0].split([i.n_original for i in sample.images])
            for image, place in zip(sample.images, columns, strict=True):
                missing = torch.ones(image.n_original, dtype=torch.bool)
                missing[image.kept] = False
                gone[row, place[missing]] = True
    here = mask.bool() & ~gone
    torch.testing.assert_close(logits[here], reference(model, inputs, gone, positions)[here], atol=1e-4, rtol=1e-4)
    assert not logits[gone].any()


#: what leaves inside the language model depends on the end of the prompt, so these cannot be recomputed with a longer one
BEFORE_LM = [
    (name, options)
    for name, options in ALL
    if name not in ("fastv", "keep-last") and not (name == "flowcut" and options.get("llm_layer", 1) is not None)
]


@pytest.mark.parametrize(("name", "options"), BEFORE_LM)
@torch.no_grad()
def test_decoding_equals_recomputing(model, name, options):
    """Tokens through the cache are those of a prompt that already holds them; rope_deltas stay the full prompt's."""
    inputs = prompts_qwen([[5, (4, 6), 7]])
    length = inputs["input_ids"].shape[1]
    with vlmcompress.compress(model, name, **options):
        new = model.generate(**inputs, **GREEDY)
        longer = {**inputs, "input_ids": new, "attention_mask": torch.ones_like(new)}
        longer["mm_token_type_ids"] = (new == IMAGE).int()
        logits = model(**longer).logits[0, length - 1 : -1]
    logits[:, [IMAGE, VIDEO, START, END]] = float("-inf")
    assert logits.argmax(-1).equal(new[0, length:])


@pytest.mark.parametrize(("name", "options"), [("random", {"keep": 6}), ("flowcut", {"keep": 4, "variant": "aligned"})])
@torch.no_grad()
def test_contiguous_positions_decode_without_a_gap(model, name, options):
    inputs = prompts_qwen([[5, (4, 6), 7]])
    length = inputs["input_ids"].shape[1]
    options = options | ({"llm_layer": None} if name == "flowcut" else {})
    with vlmcompress.compress(model, name, positions="contiguous", **options) as handle:
        new = model.generate(**inputs, **GREEDY)
        longer = {**inputs, "input_ids": new, "attention_mask": torch.ones_like(new)}
        longer["mm_token_type_ids"] = (new == IMAGE).int()
        logits = model(**longer).logits[0, length - 1 : -1]
        positions = handle.last.positions[-1, 0]
    assert positions.tolist() == list(range(len(positions)))
    logits[:, [IMAGE, VIDEO, START, END]] = float("-inf")
    assert logits.argmax(-1).equal(new[0, length:])


@torch.no_grad()
def test_everything_kept_is_the_stock_model(model):
    inputs = prompts_qwen(SPEC)
    before, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    for name in ("vtc-cls", "random", "grid", "flowcut", "fastv"):
        with vlmcompress.compress(model, name, keep=1.0) as handle:
            torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)
            assert model.generate(**inputs, **GREEDY).equal(answer)
            assert handle.last.layer_tokens == [24 + 12 + 16 + 12] * 4
    assert model(**inputs).logits.equal(before)


@torch.no_grad()
def test_second_turn(model):
    inputs = prompts_qwen([[5, (4, 6), 7]])
    more = torch.randint(4, 90, (1, 4), generator=torch.Generator().manual_seed(3))
    with vlmcompress.compress(model, "vtc-cls", keep=6):
        first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, more], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        cache = getattr(first, "cache", None) or first.past_key_values
        key = "cache" if hasattr(first, "cache") else "past_key_values"
        second = model.generate(**turn, **GREEDY, **{key: cache})
        whole = {**inputs, **turn, "mm_token_type_ids": (ids == IMAGE).int()}
        assert second.equal(model.generate(**whole, **GREEDY))


@torch.no_grad()
def test_blocks_stay_whole_and_keep_their_place(model):
    inputs = prompts_qwen([[5, (4, 6), 7]])
    with vlmcompress.compress(model, "flowcut", keep=4, variant="aligned", every=1) as handle:
        model(**inputs)
        image, scores = handle.last.samples[0].images[0], handle.last.scores
        assert len(image.kept) == 8
        assert len(image.kept_at(2)) == 4
        assert image.kept.tolist() != list(range(8))
        assert all(n % 4 == 0 for n in handle.last.tower_tokens)
        assert scores.shape == (1, 24)
    with vlmcompress.compress(model, "flowcut", keep=4, every=1) as handle:
        model(**inputs)
        image = handle.last.samples[0].images[0]
        assert image.kept.tolist() == list(range(8))
        sources = torch.cat(image.sources).tolist()
        assert len(set(sources)) == len(sources)
        assert sources != list(range(8))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tome", {}, "own resolution"),
        ("resize", {}, "smaller pictures"),
        ("tower-cls", {}, "CLS token"),
        ("flowcut", {"variant": "x"}, "aligned"),
    ],
)
def test_methods_that_cannot_serve_it(model, name, options, message):
    with pytest.raises(ValueError, match=message):
        vlmcompress.compress(model, name, **options)
