# SPDX-License-Identifier: Apache-2.0
"""InternVL, SmolVLM and Idefics3: tiles, joined patches, towers with and without CLS, against slow references."""

from __future__ import annotations

import pytest
import torch
from models import AHEAD, BEAMS, IMAGE, cached
from models_tiles import FAMILIES, one_row, prompts
from reference import embeddings, entering, real_slots, reference, shown

import vlmcompress
from vlmcompress.adapters.base import adapter_for

STEPS = 3
GREEDY = dict(max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE])
CLOSE = dict(atol=1e-4, rtol=1e-4)
SPEC = [[5, (2, 1), 7], [2, (0, 0), 3, (1, 2), 4], [6]]
ENTRY = {
    "vtc-cls": {"keep": 14}, "grid": {"keep": 0.3}, "random": {"keep": 9}, "globalcom2": {"keep": 0.3}, "no-vision": {},
}  # fmt: skip
INSIDE = {
    "pool": {"keep": 14}, "flowcut": {"keep": 16}, "fastv": {"keep": 12, "layer": 1}, "keep-last": {"budget": 30},
    "transprune": {"layers": (1, 2), "fractions": (0.5, 0.2)},
    "mustdrop": {"layers": (0, 1), "gamma": 0.03, "alpha": 0.06},
}  # fmt: skip
MADE = [
    ("internvl", "sdpa"), ("internvl-qk-norm", "eager"), ("smolvlm", "eager"), ("smolvlm", "sdpa"), ("idefics3", "sdpa"),
]  # fmt: skip


@pytest.fixture(scope="module", params=MADE, ids="-".join)
def made(request):
    kind, attention = request.param
    family = FAMILIES[kind]
    return family, family.build(attention)


def positions(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)


def gone_of(ledger, ids):
    """[B, S] bool: columns of visual tokens that did not enter."""
    gone = torch.zeros_like(ids, dtype=torch.bool)
    for row, sample in enumerate(ledger.samples):
        columns = (ids[row] == IMAGE).nonzero()[:, 0].split([i.n_original for i in sample.images])
        for image, place in zip(sample.images, columns, strict=True):
            gone[row, place] = True
            gone[row, place[image.kept]] = False
    return gone


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("name", ENTRY)
@torch.no_grad()
def test_entry_equals_reference(made, name, policy):
    """On the full sequence, with features that the stock model makes."""
    family, model = made
    inputs = prompts(family, model, SPEC)
    stock, length = embeddings(model, inputs), inputs["input_ids"].shape[1]
    more = torch.randint(4, 80, (3, 3), generator=torch.Generator().manual_seed(3))
    with vlmcompress.compress(model, name, positions=policy, **ENTRY[name]) as handle:
        logits = model(**inputs, position_ids=positions(inputs)).logits
        gone = gone_of(handle.last, inputs["input_ids"])
        first = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **GREEDY)
        full = torch.cat([first.sequences, more], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, full.shape[1] - length), value=1)
        second = model.generate(
            input_ids=full, attention_mask=mask, **cached(first), return_dict_in_generate=True, output_logits=True,
            **GREEDY,
        )  # fmt: skip
    valid = inputs["attention_mask"].bool()
    shows = [~gone] * len(adapter_for(model).decoder_layers)
    later = second.sequences[:, length:-1]
    want = reference(model, stock, shows, valid, positions(inputs), policy=policy, later=later)
    assert gone.any(1).tolist() == [True, True, False]
    torch.testing.assert_close(logits[valid & ~gone], want[:, :length][valid & ~gone], **CLOSE)
    torch.testing.assert_close(torch.stack(first.logits, 1), want[:, length - 1 : length - 1 + STEPS], **CLOSE)
    torch.testing.assert_close(torch.stack(second.logits, 1), want[:, -STEPS:], **CLOSE)


@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_methods_before_and_inside_equal_reference(made, name):
    """From the first decoder layer on, whatever merged or reordered tokens enter it."""
    family, model = made
    inputs, options = prompts(family, model, SPEC), INSIDE[name]
    out = {}
    with vlmcompress.compress(model, name, positions="original", **options) as handle:
        embeds = entering(model, lambda: out.update(logits=model(**inputs, position_ids=positions(inputs)).logits))
        ledger = handle.last
        new = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        beams = model.generate(**inputs, num_beams=BEAMS, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        for row in range(2):
            alone = one_row(inputs, SPEC, row)
            assert model.generate(**alone, **GREEDY)[0, -STEPS:].equal(new[row])
            assert model.generate(**alone, num_beams=BEAMS, **GREEDY)[0, -STEPS:].equal(beams[row])
            for image, single in zip(ledger.samples[row].images, handle.last.samples[0].images, strict=True):
                assert all(image.kept_at(layer).equal(single.kept_at(layer)) for layer in range(4))
    assert ledger.layer_tokens[-1] < 112 or name == "keep-last"
    frame, masks = ledger.frames[0], shown(ledger)
    want = reference(model, embeds, masks, real_slots(frame), frame.positions, policy="original")
    got = out["logits"].gather(1, frame.index[..., None].expand(-1, -1, out["logits"].shape[-1]))
    torch.testing.assert_close(got[masks[-1]], want[masks[-1]], **CLOSE)


@pytest.mark.parametrize("name", ["vtc-cls", "grid", "random", "pool", "globalcom2", "flowcut", "fastv"])
@torch.no_grad()
def test_keeping_all_is_bit_identical(made, name):
    family, model = made
    inputs = prompts(family, model, SPEC)
    before, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    generate, keys = model.generate, tuple(model.__dict__)
    with vlmcompress.compress(model, name, keep=1.0) as handle:
        assert model(**inputs).logits.equal(before)
        assert model.generate(**inputs, **GREEDY).equal(answer)
        assert handle.last.layer_tokens == [112] * 4
        text = prompts(family, model, [[9], [4]])
        assert model.generate(**text, **GREEDY).shape == (2, 9 + STEPS)
    assert model.generate == generate and tuple(model.__dict__) == keys


@torch.no_grad()
def test_layout_tells_tiles_and_thumbnails(made):
    family, model = made
    inputs = prompts(family, model, [[5, (2, 3), 7, (0, 0), 1], [2, (1, 2), 1]])
    with vlmcompress.compress(model, "none") as handle:
        for _ in (model(**inputs), model.generate(**inputs, **GREEDY)):
            layout = handle.last.layout
            assert layout.tiles == [(2, 3), (0, 0), (1, 2)]
            assert layout.n == [112, 16, 48]
            assert layout.grid == [(8, 12), (4, 4), (4, 8)]
            assert layout.thumbnail.nonzero()[:, 0].tolist() == [6, 7, 10]
    # the fifth tile is the middle one below; its second row, third column
    token = 4 * 16 + 1 * 4 + 2
    assert (layout.row[0, token], layout.col[0, token]) == (4 + 1, 4 + 2)
    # thumbnail cells cover two rows and three columns each
    assert layout.row[0, 96:].unique().tolist() == [1, 3, 5, 7]
    assert layout.col[0, 96:100].tolist() == [1, 4, 7, 10]
    assert layout.row[1, :16].tolist() == [r for r in range(4) for _ in range(4)]


@torch.no_grad()
def test_joined_scores_are_those_of_the_blocks(made):
    """VTC-CLS from attention maps of the eager tower: CLS row, or what a patch receives, over 2 × 2 blocks."""
    family, model = made
    adapter = adapter_for(model)
    inputs = prompts(family, model, [[5, (0, 0), 7, (0, 0), 2]])
    with vlmcompress.compress(model, "vtc-cls", keep=5) as handle:
        model(**inputs)
        images = handle.last.samples[0].images
    probabilities = []

    def note(module, args, output):
        taps = {name: part(args[0]) for name, part in adapter.tower_projections(len(probabilities)).items()}
        q, k, _ = adapter.split_qkv(len(probabilities), taps)
        probabilities.append((q @ k.mT * adapter.tower_scale).softmax(-1).mean(1))

    hooks = [adapter.tower_norm(i).register_forward_hook(lambda m, a, o, f=note: f(m, (o,), o)) for i in range(4)]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    total = sum(p[:, 0, 1:] if adapter.has_cls else p.mean(1) for p in probabilities[1:])
    blocks = total.view(2, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    for image, score in zip(images, blocks, strict=True):
        torch.testing.assert_close(image.scores(), score, **CLOSE)
        assert image.kept.equal(score.topk(5).indices.sort().values)


@pytest.mark.skipif(not AHEAD, reason="this transformers makes no features ahead")
@torch.no_grad()
def test_features_made_ahead_of_a_prompt(made):
    """Every view is then an image of its own: nobody can tell which belong together."""
    family, model = made
    inputs = prompts(family, model, [[5, (2, 1), 7]])
    pixels = inputs.pop("pixel_values")
    with vlmcompress.compress(model, "grid", keep=4) as handle:
        made_ahead = model.model.get_image_features(pixels, return_dict=True)
        model(**inputs, mm_encoder_outputs={"image": made_ahead})
        assert [len(i.kept) for i in handle.last.samples[0].images] == [4, 4, 4]


@torch.no_grad()
def test_new_image_in_the_second_turn(made):
    family, model = made
    first, second = prompts(family, model, [[4, (1, 2), 3]]), prompts(family, model, [[2, (2, 1), 5]], seed=5)
    both = torch.cat([first["input_ids"], second["input_ids"]], 1)
    axis = 1 if first["pixel_values"].ndim == 5 else 0
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]], axis)
    with vlmcompress.compress(model, "vtc-cls", keep=12) as handle:
        turn = model(**first)
        turns = model.generate(
            input_ids=both,
            pixel_values=second["pixel_values"],
            attention_mask=torch.ones_like(both),
            **cached(turn),
            **GREEDY,
        )
        assert handle.last.layout.tiles == [(2, 1)]
        at_once = model.generate(input_ids=both, pixel_values=pixels, attention_mask=torch.ones_like(both), **GREEDY)
        assert handle.last.layout.tiles == [(1, 2), (2, 1)]
    assert turns.equal(at_once)


@pytest.mark.parametrize("name", ["tome", "resize", "tower-cls"])
@torch.no_grad()
def test_tokens_leave_the_tower_as_wholes(made, name):
    """Batched as alone, with the patches that each token stands for; a tower without CLS has nothing to rank by."""
    family, model = made
    if name == "tower-cls" and not adapter_for(model).has_cls:
        with pytest.raises(ValueError, match="CLS token"):
            vlmcompress.compress(model, name, keep=0.5)
        assert "generate" not in model.__dict__
        return
    inputs = prompts(family, model, SPEC)
    with vlmcompress.compress(model, name, keep=0.25) as handle:
        new = model.generate(**inputs, **GREEDY)[:, -STEPS:]
        images = [image for sample in handle.last.samples for image in sample.images]
        assert [len(image.kept) * 4 for image in images] == [image.n_original for image in images]
        if name != "tower-cls":
            assert all(torch.cat(image.sources).sort().values.equal(torch.arange(image.n_original)) for image in images)
        for row in range(2):
            assert model.generate(**one_row(inputs, SPEC, row), **GREEDY)[0, -STEPS:].equal(new[row])


@torch.no_grad()
def test_resized_views_are_what_the_model_makes_of_small_ones(made):
    family, model = made
    inputs = prompts(family, model, [[5, (0, 0), 7]])
    pixels = inputs["pixel_values"]
    small = torch.nn.functional.interpolate(
        pixels.reshape(-1, 3, 32, 32), size=(16, 16), mode="bicubic", antialias=True
    )
    small = small.view(*pixels.shape[:-2], 16, 16)
    want = torch.cat([f.reshape(-1, f.shape[-1]) for f in model.model.get_image_features(small).pooler_output])
    with vlmcompress.compress(model, "resize", keep=0.25) as handle:
        embeds = entering(model, lambda: model(**inputs))
        frame = handle.last.frames[0]
    torch.testing.assert_close(embeds[frame.visual], want, **CLOSE)


def test_a_prompt_that_does_not_fit_is_refused():
    family = FAMILIES["internvl"]
    model = family.build()
    inputs = prompts(family, model, [[4, (1, 2), 3]])
    inputs["input_ids"][0, 6] = 5
    with vlmcompress.compress(model, "grid", keep=4), pytest.raises(ValueError, match="processor"):
        model(**inputs)
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="'default' works"):
        vlmcompress.compress(model, "grid", keep=4)


@torch.no_grad()
def test_odd_prompts_of_smolvlm():
    """Without the processor's pattern every view is an image; padding inside a view is refused."""
    family = FAMILIES["smolvlm"]
    model = family.build()
    inputs = prompts(family, model, [[4, (1, 2), 3]])
    odd = {**inputs, "input_ids": inputs["input_ids"].clone()}
    odd["input_ids"][0, 4] = 9
    with vlmcompress.compress(model, "grid", keep=4) as handle:
        model(**odd)
        assert [i.n_original for i in handle.last.samples[0].images] == [16, 16, 16]
        mask = torch.ones(1, 3, 32, 32)
        model(**inputs, pixel_attention_mask=mask)
        assert [len(i.kept) for i in handle.last.samples[0].images] == [4]
        mask[0, 1, 20:] = 0
        with pytest.raises(ValueError, match="padding inside"):
            model(**inputs, pixel_attention_mask=mask)
