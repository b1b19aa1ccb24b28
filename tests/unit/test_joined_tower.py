# SPDX-License-Identifier: Apache-2.0
"""Patches that leave a tower in raster order whose patches are joined: against the full tower, dropped ones hidden."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import IMAGE
from models_tiles import FAMILIES, prompts
from reference import entering
from torch.utils.flop_counter import FlopCounterMode

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.method import Method, Stage
from vlmcompress.views import TowerEdit

SIDE, GROUP = 4, 4  # tokens along each axis of a view, patches of each


def patches_of(tokens: torch.Tensor) -> torch.Tensor:
    """[n] tokens → [n · 4] raster places of their patches."""
    row, col = tokens // SIDE, tokens % SIDE
    return torch.stack([(2 * row + j // 2) * 2 * SIDE + 2 * col + j % 2 for j in range(GROUP)], 1).flatten()


def chosen(view: int) -> torch.Tensor:
    """Tokens that stay of a view: as many as none of the others keeps."""
    return torch.randperm(SIDE**2, generator=torch.Generator().manual_seed(view))[: 4 + 3 * view].sort().values


@dataclass(frozen=True)
class SomeTokens(Method):
    """Behind vision layer 1: ``chosen`` tokens of every view; single patches of them where ``leading``."""

    leading: bool = False

    name: ClassVar[str] = "some-tokens"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER})
    joins_patches: ClassVar[bool] = True

    def tower_layers(self, adapter):
        return (1,)

    def tower(self, layer, state):
        assert layer.group == GROUP
        rows = [
            (tokens[:, None] * GROUP + torch.arange(GROUP)).flatten() for tokens in map(chosen, range(len(layer.ids)))
        ]
        if self.leading:  # every second patch of them
            rows = [row[::2] if len(row) % 8 == 0 else row[: len(row) // 2 // GROUP * GROUP] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        keep = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        valid = torch.arange(keep.shape[1]) < lengths[:, None]
        return TowerEdit(keep, valid=valid, leading=self.leading)


def raster_of(keep: torch.Tensor) -> torch.Tensor:
    """Raster places of patches that are numbered token by token."""
    return patches_of(torch.arange(SIDE**2))[keep]


def hidden_features(model, inputs, kept: list[torch.Tensor], leading: bool) -> torch.Tensor:
    """[V, N, D] features of the stock model; behind vision layer 1 only the raster places ``kept`` are visible."""
    adapter = adapter_for(model)
    prefix = adapter.tower_prefix
    bias = torch.full((len(kept), 1, 1, prefix + SIDE**2 * GROUP), torch.finfo(torch.float32).min)
    bias[..., :prefix] = 0
    for view, places in enumerate(kept):
        bias[view, ..., prefix + places] = 0

    def hide(module, args, kwargs):
        return ((args[0], bias, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "attention_mask": bias})

    def first_places(module, args, output):
        moved = output.clone()
        for view, places in enumerate(kept):
            moved[view, prefix + patches_of(torch.arange(SIDE**2))[: len(places)]] = output[view, prefix + places]
        return moved

    hooks = [adapter.tower_masked(i).register_forward_pre_hook(hide, with_kwargs=True) for i in (2, 3)]
    if leading:
        hooks.append(adapter.tower_layers[3].register_forward_hook(first_places))
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    for hook in hooks:
        hook.remove()
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in features]).view(len(kept), SIDE**2, -1)


@pytest.mark.parametrize("leading", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["internvl", "internvl-qk-norm", "smolvlm", "gemma3"])
@torch.no_grad()
def test_equals_the_full_tower(kind, attention, leading):
    family = FAMILIES[kind]
    model = family.build(attention)
    inputs = prompts(family, model, [[5, (1, 2) if family.tiled else (0, 0), 7, (0, 0), 2]])
    method = SomeTokens(leading)
    views = 4 if family.tiled else 2

    class Layer:
        group, ids = GROUP, torch.zeros(views, 1)

    edit = method.tower(Layer, {})
    kept = [raster_of(row[real]) for row, real in zip(edit.keep, edit.valid, strict=True)]
    want = hidden_features(model, inputs, kept, leading)
    with vlmcompress.compress(model, method) as handle:
        embeds = entering(model, lambda: model(**inputs))
        ledger = handle.last
        layout = ledger.layout
    assert ledger.tower_tokens[1:3] == [
        views * (SIDE**2 * GROUP + adapter_for(model).tower_prefix),
        views * (edit.keep.shape[1] + adapter_for(model).tower_prefix),
    ]
    seen = 0
    for number, image in enumerate(ledger.samples[0].images):
        slots = (ledger.frames[0].image[0] == number).nonzero()[:, 0]
        view, cell = layout.view[number][image.kept], layout.cell[number][image.kept]
        torch.testing.assert_close(embeds[0, slots], want[view, cell], atol=1e-4, rtol=1e-4)
        for v in view.unique().tolist():
            mine = cell[view == v]
            expected = torch.arange(len(kept[v]) // GROUP) if leading else chosen(v)
            assert mine.sort().values.equal(expected)
            seen += len(mine)
    assert seen == sum(len(k) for k in kept) // GROUP


METHODS = {
    "none": {}, "grid": {"keep": 6}, "vtc-cls": {"keep": 6}, "globalcom2": {"keep": 0.3},
    "flowcut": {"keep": 8, "variant": "aligned", "llm_layer": None},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["internvl", "smolvlm", "idefics3", "gemma3", "paligemma", "paligemma-2"])
@torch.no_grad()
def test_flops_agree_with_torch(kind, name):
    family = FAMILIES[kind]
    model = family.build("eager")  # torch does not count the CPU's fused attention
    inputs = prompts(family, model, [[5, (2, 1) if family.tiled else (0, 0), 7]])
    with vlmcompress.compress(model, name, **METHODS[name]) as handle:
        with FlopCounterMode(display=False) as counter:
            model(**inputs, logits_to_keep=1)
        report = handle.report()
    assert (inputs["input_ids"] == IMAGE).sum() == report.tokens_before
    assert report.flops["full"] == pytest.approx(counter.get_total_flops(), rel=0.005)
    if name == "none":
        assert report.flops_before["full"] == pytest.approx(counter.get_total_flops(), rel=0.005)


@torch.no_grad()
def test_flowcut_keeps_whole_blocks_of_a_tower_with_cls():
    """No released code joins patches of such a tower, so what it keeps are tokens, whatever the variant."""
    family = FAMILIES["internvl"]
    model = family.build()
    inputs = prompts(family, model, [[5, (0, 0), 7]])
    found = []
    for variant in ("aligned", "official"):
        with vlmcompress.compress(model, "flowcut", keep=6, llm_layer=None, variant=variant) as handle:
            model(**inputs)
            found.append(handle.last.samples[0].images[0].kept)
    assert found[0].equal(found[1])
    assert not found[0].equal(torch.arange(6))
