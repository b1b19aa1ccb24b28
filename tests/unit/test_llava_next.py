# SPDX-License-Identifier: Apache-2.0
"""The geometry of tiled images, and every baseline on them."""

from __future__ import annotations

import pytest
import torch
from models import BEAMS, IMAGE
from models_next import SIZES, one_row, prompts_next, tiny_next

import vlmcompress
from vlmcompress.adapters.base import adapter_for

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return tiny_next(eos_token_id=None)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_layout_is_the_packed_order(model, size):
    """Features gathered by the layout are what the stock model feeds."""
    inputs = prompts_next(model, [[2, size, 3, "row", 2]])
    layout = adapter_for(model).geometry(inputs)
    pixels = adapter_for(model).pixels(inputs)
    tower = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = layout.of_views(model.model.multi_modal_projector(tower))
    stock = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    for image, features in enumerate(stock):
        n = layout.n[image]
        assert n == len(features)
        assert layout.valid[image].sum() == n
        newline = layout.cell[image, :n] == -1
        assert newline.sum() == layout.grid[image][0]
        torch.testing.assert_close(projected[image, :n][~newline], features[~newline])
        assert (features[newline] == model.model.image_newline).all()
    rows, cols = layout.grid[0]
    crop = layout.patch[0] & ~layout.thumbnail[layout.view[0].clamp_min(0)]
    assert (layout.row[0] * cols + layout.col[0])[crop].tolist() == list(range(rows * cols))
    assert layout.row[0][: layout.n[0]].max() == rows - 1
    assert layout.col[0].max() == cols
    back = layout.to_views(layout.of_views(projected.new_ones(layout.view_image.shape[0], 36)))
    assert back.sum() == layout.patch.sum()


def test_thumbnail_covers_the_picture(model):
    layout = adapter_for(model).geometry(prompts_next(model, [[1, "tall", 1]]))
    rows, cols = layout.grid[0]
    assert (rows, cols) == (12, 8)
    assert layout.row[0, :36].unique().tolist() == [1, 3, 5, 7, 9, 11]
    assert layout.col[0, :6].tolist() == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("size", [(2, 80), (80, 2)])
@pytest.mark.parametrize("name", ["vtc-cls", "grid", "pool", "globalcom2", "tower-cls"])
@torch.no_grad()
def test_slivers_keep_their_thumbnail(model, name, size):
    """Unpadding leaves no crop cell of them; the stock model feeds the thumbnail and, where rows are left, newlines."""
    inputs = prompts_next(model, [[3, size, 2], [2, "wide", 4]])
    before = model(**inputs).logits
    with vlmcompress.compress(model, name, keep=1.0):
        assert model(**inputs).logits.equal(before)
    options = {"newlines": "occupied"} if name == "globalcom2" else {}
    with vlmcompress.compress(model, name, keep=12, **options) as handle:
        assert model(**inputs).logits.isfinite().all()
        image = handle.last.samples[0].images[0]
        assert 0 < len(image.kept) <= 12
        assert not image.is_newline[image.kept].any()


@torch.no_grad()
def test_none_is_bit_identical_and_reports(model):
    inputs = prompts_next(model, [[5, "square", 3], [2, "row", 3, "tall", 1]])
    before = model(**inputs).logits
    with vlmcompress.compress(model, "none") as handle:
        assert model(**inputs).logits.equal(before)
        assert [len(i.kept) for s in handle.last.samples for i in s.images] == [
            36 + 12 * 13,
            36 + 6 * 19 + 0,
            36 + 12 * 9,
        ]
        assert handle.report().tokens == int((inputs["input_ids"] == IMAGE).sum())


#: a random model would otherwise answer with image placeholders
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
SPEC = [[5, "square", 3], [2, "row", 3, "tall", 1], [8, "wide", 4]]
IMAGES = [slice(0, 1), slice(1, 3), slice(3, 4)]
ALL = [
    ("vtc-cls", {"keep": 30}), ("vtc-cls", {"keep": 0.3, "pooled": True}), ("vtc-cls", {"keep": 9, "newlines": False}),
    ("random", {"keep": 23}), ("grid", {"keep": 31}), ("pool", {"keep": 31}), ("resize", {"keep": 0.25}),
    ("tome", {"keep": 0.25}), ("tower-cls", {"keep": 40}), ("tower-cls", {"keep": 0.25}), ("fastv", {"keep": 30}),
    ("fastv", {"keep": 0.2, "window": 3}), ("no-vision", {}),
]  # fmt: skip
names = [name + "".join(f"-{v}" for v in o.values()) for name, o in ALL]


@pytest.mark.parametrize(("name", "options"), ALL, ids=names)
@torch.no_grad()
def test_batched_equals_single(model, name, options):
    left, right = prompts_next(model, SPEC), prompts_next(model, SPEC, side="right")
    with vlmcompress.compress(model, name, **options) as handle:
        new = model.generate(**left, **GREEDY)[:, left["input_ids"].shape[1] :]
        beams = model.generate(**left, num_beams=BEAMS, **GREEDY)[:, left["input_ids"].shape[1] :]
        positions = [(x["attention_mask"].cumsum(1) - 1).clamp_min(0) for x in (left, right)]
        batch_left = model(**left, position_ids=positions[0]).logits
        records = [[i.kept_at(3) for i in s.images] for s in handle.last.samples]
        batch_right = model(**right, position_ids=positions[1]).logits
        for row, images in enumerate(IMAGES):
            alone = one_row(left, row, images)
            n = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for kept, image in zip(records[row], handle.last.samples[0].images, strict=True):
                assert kept.equal(image.kept_at(3))
            torch.testing.assert_close(batch_left[row, -n:], logits, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(batch_right[row, :n], logits, atol=2e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, n:].equal(new[row])
            assert model.generate(**alone, num_beams=BEAMS, **GREEDY)[0, n:].equal(beams[row])


@pytest.mark.parametrize("keep", [1.0, 100_000])
@pytest.mark.parametrize("name", ["vtc-cls", "random", "grid", "pool", "resize", "tome", "tower-cls", "fastv"])
@torch.no_grad()
def test_keeping_all_is_bit_identical(model, name, keep):
    inputs = prompts_next(model, SPEC)
    if name == "resize" and isinstance(keep, int):
        with pytest.raises(ValueError, match="share"):
            vlmcompress.compress(model, name, keep=keep)
        return
    before = model(**inputs).logits
    with vlmcompress.compress(model, name, keep=keep):
        assert model(**inputs).logits.equal(before)


@pytest.mark.parametrize(("name", "options"), ALL[:6], ids=names[:6])
@torch.no_grad()
def test_budgets_and_newlines(model, name, options):
    inputs = prompts_next(model, SPEC)
    with vlmcompress.compress(model, name, **options) as handle:
        model(**inputs)
        layout = handle.last.layout
        for image in (i for s in handle.last.samples for i in s.images):
            newline, kept = image.is_newline, image.kept
            patches = int((~newline).sum())
            wanted = options["keep"] if isinstance(options["keep"], int) else round(options["keep"] * patches)
            chosen = kept[~newline[kept]]
            assert len(chosen) == wanted or (name == "pool" and 0.6 * wanted <= len(chosen) <= wanted)
            crops = chosen[~layout.thumbnail[image.views[chosen]]]
            rows = set() if options.get("newlines") is False else set(image.rows[crops].tolist())
            assert set(image.rows[kept[newline[kept]]].tolist()) == rows
            if options.get("pooled") or name == "pool":
                continue
            per_view = torch.bincount(image.views[chosen] - image.views[chosen].min())
            full = torch.bincount(image.views[~newline] - image.views[chosen].min())[: len(per_view)]
            assert per_view.max() - per_view[per_view < full].min() <= 1


@torch.no_grad()
def test_pooled_tokens_know_their_sources(model):
    inputs = prompts_next(model, [[2, "wide", 3]])
    with vlmcompress.compress(model, "pool", keep=40) as handle:
        model(**inputs)
        image = handle.last.samples[0].images[0]
        sources = image.sources
    patches = torch.cat([s for s, k in zip(sources, image.kept, strict=True) if not image.is_newline[k]])
    assert patches.sort().values.equal((~image.is_newline).nonzero()[:, 0])
    for token, group in zip(image.kept, sources, strict=True):
        assert token in group
        assert len(set(image.views[group].tolist())) == 1


@torch.no_grad()
def test_tokens_merged_in_the_tower_know_their_sources(model):
    inputs = prompts_next(model, [[2, "wide", 3]])
    plain = adapter_for(model).geometry(inputs)
    with vlmcompress.compress(model, "tome", keep=40) as handle:
        model(**inputs)
        image = handle.last.samples[0].images[0]
        sources = image.sources
    patches = torch.cat([s for s, k in zip(sources, image.kept, strict=True) if not image.is_newline[k]])
    assert len(set(patches.tolist())) == len(patches) and not image.is_newline[patches].any()
    # what is missing was merged into padding of the tiles, which the model cuts off
    missing = int(plain.patch[0].sum()) - len(patches)
    assert 0 <= missing < len(patches) and max(map(len, sources)) > 1
    for token, group in zip(image.kept, sources, strict=True):
        assert token in group
        assert len(set(image.views[group].tolist())) == 1


@torch.no_grad()
def test_tome_refuses_different_numbers_of_views(model):
    inputs = prompts_next(model, [[2, "wide", 3], [2, "row", 3]])
    with vlmcompress.compress(model, "tome", keep=40), pytest.raises(ValueError, match="different numbers of views"):
        model(**inputs)
