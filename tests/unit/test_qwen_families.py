# SPDX-License-Identifier: Apache-2.0
"""The Qwen families with images and videos in one prompt: attention windows, DeepStack, timestamps, M-RoPE, turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import AHEAD, cached
from models_qwen import END, FAMILIES, IMAGE, START, VIDEO, prompts_qwen, row_of, tiny_qwen, typed

import vlmcompress
from vlmcompress import Method, Stage
from vlmcompress.adapters.base import adapter_for
from vlmcompress.methods.flowcut import FlowCut
from vlmcompress.methods.vtc_cls import VtcCls
from vlmcompress.views import TowerEdit

GREEDY = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE, VIDEO, START, END])
SPEC = [[5, (4, 6), 3, (3, 2, 4), 7], [2, (3, 4), 3, (4, 4), 2], [8, (2, 3, 2), 4]]
FILTERS = {"layers": (0, 1), "keep": 0.5}
METHODS = [
    ("vtc-cls", {"keep": 5}),
    ("vtc-cls", {"keep": 0.3, "score": "mean_query", "layers": 2}),
    ("pool", {"keep": 5}),
    ("no-vision", {}),
    ("fastv", {"keep": 5, "layer": 1}),
    ("transprune", {"layers": (1, 2, 3), "fractions": (0.8, 0.5, 0.2)}),
    ("flowcut", {"keep": 4, "every": 1}),
    ("mustdrop", FILTERS),
    ("keep-last", {"budget": 20}),
]
names = [f"{name}{i}" for i, (name, _) in enumerate(METHODS)]
LATER = ["qwen2_5_vl", "qwen3_vl"]


@pytest.fixture(scope="module")
def models():
    return {(family, kind): tiny_qwen(kind, family=family) for family in FAMILIES for kind in ("sdpa", "eager")}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_everything_kept_is_the_stock_model(models, family):
    model, inputs = models[family, "sdpa"], prompts_qwen(SPEC, family=family)
    before, answer = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    for name in ("vtc-cls", "grid", "flowcut", "fastv", "transprune", "mustdrop"):
        with vlmcompress.compress(model, name, keep=1.0, **({"merge": False} if name == "mustdrop" else {})) as handle:
            torch.testing.assert_close(model(**inputs).logits, before, atol=1e-5, rtol=1e-5)
            assert model.generate(**inputs, **GREEDY).equal(answer)
            assert handle.last.layer_tokens == [88] * 4
    assert model(**inputs).logits.equal(before)


@pytest.mark.parametrize(("name", "options"), METHODS, ids=names)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batched_equals_single_and_padding_does_not_matter(models, family, name, options):
    # the attention back-ends take turns over the methods
    model = models[family, "sdpa" if METHODS.index((name, options)) % 2 else "eager"]
    left, right = prompts_qwen(SPEC, family=family), prompts_qwen(SPEC, side="right", family=family)
    width = left["input_ids"].shape[1]
    with vlmcompress.compress(model, name, **options) as handle:
        new = model.generate(**left, **GREEDY)[:, width:]
        beams = model.generate(**left, **GREEDY, num_beams=2)[:, width:]
        batch, ledger = model(**left).logits, handle.last
        padded_behind = model(**right).logits
        assert [[i.kind for i in s.images] for s in ledger.samples] == [["image", "video"], ["image"] * 2, ["video"]]
        for row in range(len(SPEC)):
            alone = row_of(left, row)
            length = alone["input_ids"].shape[1]
            logits = model(**alone).logits[0]
            for image, single in zip(ledger.samples[row].images, handle.last.samples[0].images, strict=True):
                assert all(image.kept_at(layer).equal(single.kept_at(layer)) for layer in range(4))
            torch.testing.assert_close(batch[row, -length:], logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(padded_behind[row, :length], logits, atol=1e-4, rtol=1e-4)
            assert model.generate(**alone, **GREEDY)[0, length:].equal(new[row])
            assert model.generate(**alone, **GREEDY, num_beams=2)[0, length:].equal(beams[row])


# the slow reference ---------------------------------------------------------------------------------------------------
def stock_entry(model, inputs):
    """Embeddings [B, S, D], positions [3, B, S] and what DeepStack adds behind each layer, of the stock model."""
    seen = {}
    text = model.model.language_model
    hooks = [
        text.register_forward_pre_hook(lambda m, a, kw: seen.update(kw), with_kwargs=True),
        text.layers[0].register_forward_pre_hook(
            lambda m, a, kw: seen.update(hidden=a[0] if a else kw["hidden_states"]), with_kwargs=True
        ),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    added = []
    for feature in seen.get("deepstack_visual_embeds") or []:
        table = torch.zeros_like(seen["hidden"])
        table[seen["visual_pos_masks"]] = feature
        added.append(table)
    return seen["hidden"], seen["position_ids"][-3:], added


def columns_alive(inputs, ledger):
    """[B, S] bool per decoder layer: text, and the visual tokens that the ledger says the layer processed."""
    ids, found = inputs["input_ids"], []
    for layer in range(ledger.n_layers):
        alive = (ids != IMAGE) & (ids != VIDEO)
        for row, sample in enumerate(ledger.samples):
            for kind, token in (("image", IMAGE), ("video", VIDEO)):
                mine = [image for image in sample.images if image.kind == kind]
                places = (ids[row] == token).nonzero()[:, 0].split([image.n_original for image in mine])
                for image, place in zip(mine, places, strict=True):
                    alive[row, place[image.kept_at(layer)]] = True
        found.append(alive)
    return found


def slow(model, entry, valid, alive, later, later_alive):
    """Logits [B, S + T, vocab] of the whole prompt followed by ``later`` [B, T]: nothing shortened, no cache."""
    hidden, positions, added = entry
    text, steps = model.model.language_model, later.shape[1]
    hidden = torch.cat([hidden, model.get_input_embeddings()(later)], dim=1)
    behind = positions.amax(dim=(0, 2))[None, :, None] + 1 + torch.arange(steps)
    tables = text.rotary_emb(hidden, position_ids=torch.cat([positions, behind.expand(3, -1, -1)], dim=2))
    length, prompt = hidden.shape[1], valid.shape[1]
    ones = torch.ones(len(valid), steps, dtype=torch.bool)
    for index, layer in enumerate(text.layers):
        keys = torch.cat([alive[index] & valid, ones], 1)[:, None].repeat(1, length, 1)
        keys[:, prompt:, :prompt] = (later_alive[index] & valid)[:, None]
        seen = keys & torch.ones(length, length).tril().bool() | torch.eye(length).bool()
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=tables)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if index < len(added):
            hidden = hidden + torch.nn.functional.pad(added[index], (0, 0, 0, steps))
    return model.lm_head(text.norm(hidden))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "options"), [m for m in METHODS if m[0] not in ("pool", "flowcut", "keep-last")],
    ids=[n for n, m in zip(names, METHODS, strict=True) if m[0] not in ("pool", "flowcut", "keep-last")],
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_equals_the_slow_reference(models, family, name, options, kind):
    """Entry, prefill and cache: logits of the prompt and of four decoded tokens, batch padded on the left."""
    model, inputs = models[family, kind], prompts_qwen(SPEC, family=family)
    entry, valid = stock_entry(model, inputs), inputs["attention_mask"].bool()
    with vlmcompress.compress(model, name, **options) as handle:
        logits, ledger = model(**inputs).logits, handle.last
        answer = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    alive = columns_alive(inputs, ledger)
    # MustDrop's third stage: from the first filter, here behind layer 0, what is decoded sees what passed the last one
    later = [alive[-1]] * 4 if name == "mustdrop" else alive
    new = answer.sequences[:, valid.shape[1] :]
    expected = slow(model, entry, valid, alive, new, later)
    here = valid & alive[-1]
    torch.testing.assert_close(logits[here], expected[:, : valid.shape[1]][here], atol=1e-4, rtol=1e-4)
    assert not logits[valid & ~alive[-1]].any()
    decoded = expected[:, valid.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(answer.logits, 1), decoded, atol=1e-4, rtol=1e-4)


@dataclass(frozen=True)
class SomeBlocks(Method):
    """Behind vision layers 0 and 1, of every view all tokens but each third one of those that are left."""

    name: ClassVar[str] = "some-blocks"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})
    joins_patches: ClassVar[bool] = True

    def tower_layers(self, adapter):
        return 0, 1

    def tower(self, layer, state):
        block = torch.arange(layer.n // layer.group)
        left = (block[block % 3 != 1][:, None] * layer.group + torch.arange(layer.group)).flatten()
        keep = left.expand(len(layer.ids), -1)
        return TowerEdit(keep, valid=None if layer.valid is None else layer.valid.gather(1, keep))


def slow_tower(model, pixels, grid, left):
    """Features of every token behind the merger and behind DeepStack's; ``left``: [patches] bool behind layers 0 and 1."""
    tower, adapter = model.model.visual, adapter_for(model)
    rows = {}
    hook = tower.blocks[0].register_forward_pre_hook(lambda m, a, kw: rows.update(kw, x=a[0]), with_kwargs=True)
    tower(pixels, grid_thw=grid)
    hook.remove()
    merge = tower.spatial_merge_size
    views = torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0])
    view = torch.arange(len(views)).repeat_interleave(views)
    cells = [(h // merge, w // merge) for t, h, w in grid.tolist() for _ in range(t)]
    order, window = torch.arange(len(view)), view
    numbers = adapter.windows(cells, torch.device("cpu"))
    if numbers is not None:
        window = torch.cat([numbers[v, : h * w] + 100 * v for v, (h, w) in enumerate(cells)]).repeat_interleave(4)
        order = window.argsort(stable=True)
    x, inverse = rows["x"], order.argsort()
    cos, sin = (t[:, None] for t in rows["position_embeddings"])
    features = []
    for index, block in enumerate(tower.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 4, -1)).unbind(1)
        q, k = (z * cos + torch.cat([-z[..., 4:], z[..., :4]], -1) * sin for z in (q, k))
        run = (view if index in adapter.global_layers else window)[order]
        seen = run[:, None] == run
        seen &= left[min(index, 2)][order] | torch.eye(len(x)).bool()
        scores = (torch.einsum("qhd,khd->hqk", q, k) * 8**-0.5).masked_fill(~seen, float("-inf"))
        x = x + block.attn.proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
        x = x + block.mlp(block.norm2(x))
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            features.append(tower.deepstack_merger_list[tower.deepstack_visual_indexes.index(index)](x[inverse]))
    return [tower.merger(x[inverse]), *features]


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cuts_in_the_tower_equal_the_slow_tower(models, family, kind):
    """Windows lose patches and close up, DeepStack's features keep to their tokens."""
    model, inputs = models[family, kind], prompts_qwen([[5, (4, 6), 3, (5, 3), 7]], family=family)
    grid = inputs["image_grid_thw"]
    left = [torch.ones(int(grid.prod(1).sum()), dtype=torch.bool)]
    for _ in range(2):
        alive = [x[::4].nonzero()[:, 0] for x in left[-1].split(grid.prod(1).tolist())]
        stays = [
            torch.isin(torch.arange(int(g.prod()) // 4), a[torch.arange(len(a)) % 3 != 1])
            for g, a in zip(grid, alive, strict=True)
        ]
        left.append(torch.cat(stays).repeat_interleave(4))
    expected = slow_tower(model, inputs["pixel_values"], grid, left)
    with vlmcompress.compress(model, SomeBlocks()) as handle:
        hidden, positions, added = stock_entry(model, inputs)
        kept = torch.cat(
            [image.kept + first for image, first in zip(handle.last.samples[0].images, (0, 24), strict=True)]
        )
        tokens = handle.last.tower_tokens
    assert kept.equal(left[2][::4].nonzero()[:, 0])
    assert tokens == [156, *[4 * int(x[::4].sum()) for x in (left[1], left[2], left[2])]]
    ids = inputs["input_ids"][0]
    text, image = (ids != IMAGE).nonzero()[:, 0], (ids == IMAGE).nonzero()[:, 0]
    columns = torch.cat([text, image[kept]]).sort().values
    visual = ids[columns] == IMAGE
    torch.testing.assert_close(hidden[0, visual], expected[0][kept], atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(added, expected[1:], strict=True):
        torch.testing.assert_close(ours[0, visual], theirs[kept], atol=1e-4, rtol=1e-4)
    stock = model.model.get_rope_index(ids[None], inputs["mm_token_type_ids"], grid)[0]
    assert positions.equal(stock[..., columns])


# positions and turns --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["random", "fastv"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_contiguous_positions_leave_no_gap(models, family, name, side):
    """Next tokens go on behind the last real one, on whichever side the batch is padded."""
    model, inputs = models[family, "sdpa"], prompts_qwen(SPEC, side=side, family=family)
    text = model.model.language_model
    seen = []
    hook = text.rotary_emb.register_forward_pre_hook(
        lambda m, a, kw: seen.append((a[1] if len(a) > 1 else kw["position_ids"])[-3:]), with_kwargs=True
    )
    with vlmcompress.compress(model, name, keep=4, positions="contiguous") as handle:
        out = model(**inputs, use_cache=True)
        frame = handle.last.frame_at(3)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        # the caller counts on from the uncompressed prompt
        after = model.model.get_rope_index(**{k: v for k, v in inputs.items() if "pixel" not in k})[0].amax((0, 2)) + 1
        model(
            input_ids=torch.tensor([[9]] * 3), attention_mask=mask, **cached(out),
            position_ids=after[None, :, None].expand(3, -1, -1),
        )  # fmt: skip
    hook.remove()
    last = seen[-1]
    valid = torch.ones_like(frame.index, dtype=torch.bool) if frame.valid is None else frame.valid
    for row in range(3):
        n = int(valid[row].sum())
        assert frame.positions[-3:, row][:, valid[row]].tolist() == [list(range(n))] * 3
        assert last[:, row].tolist() == [[n]] * 3


@pytest.mark.skipif(not AHEAD, reason="this transformers makes no features ahead")
@pytest.mark.parametrize("positions", ["published", "contiguous"])
@pytest.mark.parametrize(("name", "options"), [("vtc-cls", {"keep": 4}), ("keep-last", {"budget": 1000})])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_second_turn_with_new_images_and_videos(models, family, name, options, positions):
    model = models[family, "sdpa"]
    first = prompts_qwen([[5, (4, 6), 3]], family=family)
    second = prompts_qwen([[2, (2, 4), 4, (2, 2, 2), 3]], seed=7, family=family)
    media = {k: v for k, v in second.items() if "video" in k or "second" in k}
    for key in ("pixel_values", "image_grid_thw"):
        media[key] = torch.cat([first[key], second[key]])
    with vlmcompress.compress(model, name, positions=positions, **options) as handle:
        start = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([start.sequences, second["input_ids"]], 1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **typed(ids)}
        expected = model.generate(**turn, **media, **GREEDY)
        # generate takes the new features ready-made, and the grids of all images for their positions
        inner = model.model
        ready = {
            "image": inner.get_image_features(second["pixel_values"], second["image_grid_thw"], return_dict=True),
            "video": inner.get_video_features(media["pixel_values_videos"], media["video_grid_thw"], return_dict=True),
        }
        grids = {k: v for k, v in media.items() if "pixel" not in k}
        found = model.generate(**turn, **grids, mm_encoder_outputs=ready, **cached(start), **GREEDY)
        assert [i.kind for i in handle.last.samples[0].images] == ["image", "video"]
    assert found.equal(expected)


# what serves what -----------------------------------------------------------------------------------------------------
def test_window_layers_neither_count_nor_cut(models):
    adapter = adapter_for(models["qwen2_5_vl", "sdpa"])
    assert list(VtcCls(layers=3).tower_layers(adapter)) == [1, 3]
    assert list(VtcCls(layers=1).tower_layers(adapter)) == [3]
    with pytest.raises(ValueError, match="leaves no vision layer"):
        VtcCls(start_layer=4).check_family(adapter)
    plain = adapter_for(models["qwen3_vl", "sdpa"])
    assert list(VtcCls(layers=3).tower_layers(plain)) == [1, 2, 3]
    assert list(FlowCut().tower_layers(adapter)) == [0, 1, 2, 3]


@torch.no_grad()
def test_flowcut_drops_behind_layers_with_full_attention_only():
    model = tiny_qwen(family="qwen2_5_vl")
    for block in model.model.visual.blocks:
        block.attn.qkv.weight.mul_(4)  # attention that is concentrated enough for early cuts
    with vlmcompress.compress(model, "flowcut", keep=2, every=1) as handle:
        model(**prompts_qwen([[5, (6, 6), 7]], family="qwen2_5_vl"))
        counts = handle.last.tower_tokens
    assert counts[0] == counts[1] == 144
    assert counts[1] > counts[2] == counts[3]
    assert counts[2] % 4 == 0


@pytest.mark.parametrize("family", LATER)
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flowcut", {"variant": "official"}, "whole tokens"),
        ("tome", {}, "own resolution"),
        ("resize", {}, "smaller pictures"),
        ("tower-cls", {}, "CLS token"),
        ("globalcom2", {"keep": 0.5, "layout": "x"}, "layout is"),
    ],
)
def test_what_cannot_be_served_is_refused(models, family, name, options, message):
    with pytest.raises(ValueError, match=message):
        vlmcompress.compress(models[family, "sdpa"], name, **options)
