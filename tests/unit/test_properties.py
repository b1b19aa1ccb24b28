# SPDX-License-Identifier: Apache-2.0
"""Properties over budgets, batch shapes and paddings; the pipeline; third-party names; memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import IMAGE, prompts, tiny_llava
from PIL import Image
from transformers import pipeline

import vlmcompress
from vlmcompress.method import Method, Stage, check_keep
from vlmcompress.ops.select import even_indices, fit_grid, largest_remainder, top_indices, top_mask
from vlmcompress.registry import METHODS
from vlmcompress.tokens import pack

N = 36
QUICK = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BUDGETS = st.one_of(st.integers(1, 50), st.floats(0.01, 1.0))
ROWS = st.lists(
    st.lists(st.one_of(st.integers(1, 6), st.just("image")), min_size=1, max_size=4), min_size=1, max_size=3
).filter(lambda rows: any("image" in row for row in rows))


@pytest.fixture(scope="module")
def model():
    return tiny_llava(eos_token_id=None)


@QUICK
@given(rows=ROWS, keep=BUDGETS, side=st.sampled_from(["left", "right"]), name=st.sampled_from(
    ["vtc-cls", "random", "grid", "pool", "resize", "tome", "tower-cls", "fastv"]), data=st.data())  # fmt: skip
@torch.no_grad()
def test_any_batch_equals_its_rows(model, rows, keep, side, name, data):
    rows = [[*row, 2] for row in rows]  # the answer is predicted from text
    inputs = prompts(rows, N, side=side)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    policy = data.draw(st.sampled_from(["original", "contiguous"]))
    stock = model(**inputs, position_ids=positions).logits
    with vlmcompress.compress(model, name, keep=keep, positions=policy) as handle:
        logits = model(**inputs, position_ids=positions).logits
        records = [s.images for s in handle.last.samples]
        for image in (i for images in records for i in images):
            for layer in range(4):
                kept = image.kept_at(layer)
                assert kept.equal(kept.unique())
                assert len(kept) == 0 or 0 <= int(kept[0]) <= int(kept[-1]) < image.n_original == N
            wanted = min(keep, N) if isinstance(keep, int) else max(1, round(keep * N))
            assert len(image.kept_at(3)) <= wanted
            assert name in ("pool", "resize") or len(image.kept_at(3)) == wanted
        row, first = data.draw(st.integers(0, len(rows) - 1)), 0
        first = sum(r.count("image") for r in rows[:row])
        real = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row][real][None]}
        if "image" in rows[row]:
            alone["pixel_values"] = inputs["pixel_values"][first : first + rows[row].count("image")]
        single = model(**alone).logits[0]
    torch.testing.assert_close(logits[row][real], single, atol=1e-4, rtol=1e-4)
    assert model(**inputs, position_ids=positions).logits.equal(stock)


@QUICK
@given(st.integers(1, 40), st.integers(1, 30), st.integers(0, 2**31))
def test_selection_is_sorted_unique_and_in_range(n, k, seed):
    k = min(k, n)
    scores = torch.randint(0, 4, (3, n), generator=torch.Generator().manual_seed(seed)).float()
    counts = [k, max(1, k // 2), k]
    picked = top_indices(scores, counts)
    mask = top_mask(scores, counts)
    for row, count in enumerate(counts):
        chosen = picked[row, :count]
        assert chosen.equal(chosen.unique())
        assert mask[row].nonzero()[:, 0].equal(chosen)
        out = torch.ones(n, dtype=torch.bool)
        out[chosen] = False
        assert out.sum() == 0 or scores[row, chosen].min() >= scores[row, out].max()
    spread = even_indices(n, k)
    assert spread.equal(spread.unique())
    assert int(spread.max()) < n
    h, w = fit_grid(k, n, n)
    assert 1 <= h * w <= k


@QUICK
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), min_size=1, max_size=6), st.data())
def test_apportionment_is_exact(parts, data):
    shares, caps = [p[0] for p in parts], [p[1] for p in parts]
    total = data.draw(st.integers(0, sum(caps)))
    result = largest_remainder(shares, total, caps)
    assert sum(result) == total
    assert all(0 <= r <= c for r, c in zip(result, caps, strict=True))
    with pytest.raises(ValueError, match="do not fit"):
        largest_remainder(shares, sum(caps) + 1, caps)


@QUICK
@given(st.integers(1, 20), st.integers(0, 2**31))
def test_pack_flushes_right_and_never_repeats_a_column(length, seed):
    keep = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < 0.6
    longest = int(keep.sum(1).max())
    index, valid = pack(keep, longest)
    for row in range(3):
        assert index[row][valid[row]].equal(keep[row].nonzero()[:, 0])
        assert len(index[row].unique()) == longest
        assert valid[row].equal(valid[row].sort().values)


def test_pipeline(tiny_folder):
    pipe = pipeline("image-text-to-text", model=str(tiny_folder), device="cpu")
    image = Image.new("RGB", (70, 40), "red")
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what color"}]}]
    with vlmcompress.compress(pipe.model, "vtc-cls", keep=9) as handle:
        answer = pipe(text=chat, max_new_tokens=2)
        assert handle.last.layer_tokens == [9] * 3
    assert "generated_text" in answer[0]


@torch.no_grad()
def test_log_likelihood_equals_generation(model):
    inputs = prompts([[5, "image", 7]], N)
    with vlmcompress.compress(model, "vtc-cls", keep=9):
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE], output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        scored = model(input_ids=out.sequences, pixel_values=inputs["pixel_values"]).logits
    n = inputs["input_ids"].shape[1]
    torch.testing.assert_close(scored[:, n - 1 : -1], torch.stack(out.logits, 1), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_random_does_not_depend_on_batch_mates_but_on_seed_and_image(model):
    inputs = prompts([[2, "image", 2], [2, "image", 2]], N)
    kept = {}
    for seed in (0, 1):
        with vlmcompress.compress(model, "random", keep=9, seed=seed) as handle:
            model(**inputs)
            kept[seed] = [s.images[0].kept.tolist() for s in handle.last.samples]
            model(input_ids=inputs["input_ids"][1:], pixel_values=inputs["pixel_values"][1:])
            assert handle.last.samples[0].images[0].kept.tolist() == kept[seed][1]
    assert kept[0][0] != kept[0][1]
    assert kept[0] != kept[1]


def test_a_method_from_outside_needs_no_change_here(model):
    from vlmcompress.views import Selection

    @vlmcompress.register_method("brightest")
    @dataclass(frozen=True)
    class Brightest(Method):
        keep: int | float = 4
        stages = frozenset({Stage.ENTRY})

        def validate(self):
            check_keep(self.keep)

        def entry(self, tokens, state):
            counts = tokens.budgets(self.keep)
            return Selection(top_indices(tokens.features.float().norm(dim=-1), counts), counts)

    try:
        with torch.no_grad(), vlmcompress.compress(model, "brightest", keep=5) as handle:
            model(**prompts([[2, "image", 2]], N))
            assert handle.last.layer_tokens == [5] * 4
        with pytest.raises(ValueError, match="already taken"):
            vlmcompress.register_method("grid")(Brightest)
    finally:
        METHODS._items.pop("brightest")


@torch.no_grad()
def test_no_square_map_is_formed_for_the_scores():
    """Peak size of any tensor that the hooks make, by torch's own dispatch, at 1600 visual tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.largest = max(Largest.largest, tensor.numel())
            return out

    big = tiny_llava(side=40, eos_token_id=None)
    inputs = prompts([[3, "image", 5]], 1600, image_size=160)
    square = 4 * 1600 * 1600  # heads × N × N
    for name, options in [("vtc-cls", {"keep": 64}), ("fastv", {"keep": 64}), ("tower-cls", {"keep": 64})]:
        with vlmcompress.compress(big, name, **options), Largest():
            big(**inputs, logits_to_keep=1)
    assert 0 < Largest.largest < square / 4
