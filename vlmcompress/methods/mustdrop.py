# SPDX-License-Identifier: Apache-2.0
"""MustDrop: merge alike patches in the tower, drop what the text ignores between decoder layers, then clear the cache.

Liu, Shi et al., "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model",
arXiv 2411.10803.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..method import Method, Stage, check_keep
from ..ops.schedules import declining_counts
from ..ops.scores import received_attention
from ..ops.select import top_mask
from ..ops.windows import merge_windows
from ..pooled import merged_windows
from ..registry import register_method
from ..views import CacheLayer, Cut, EntryTokens, Eviction, PrefillLayer, Selection, TowerEdit, TowerLayer
from .output_cache import output_aware

if TYPE_CHECKING:
    from ..adapters.base import Adapter

#: filters come after these of 32 decoder layers (0-based)
LAYERS, DEPTH = (2, 6, 10, 14), 32
#: published thresholds (gamma, alpha) by the average number of tokens that they gave on LLaVA-1.5-7B
PRESETS = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}


@register_method("mustdrop")
@dataclass(frozen=True)
class MustDrop(Method):
    """Three stages: window merging and a key set in the tower, a dual-attention filter in prefill, a smaller cache.

    TOWER: behind the first vision layer, windows of patches whose mean mutual cosine reaches ``similarity`` become one
    token, their mean; merged tokens come first in the sequence. The ``key_rate`` share of the remaining tokens that the
    CLS token of the last vision layer attends to most is never dropped. PREFILL: behind each filter layer a token
    leaves when its share of the attention from the text after the image is below ``gamma`` *and* no single text token
    gives it ``alpha``. CACHE: after the prompt, the layers from the first filter on keep only what passed the last
    one. Thresholds make the number of tokens adaptive; :func:`vlmcompress.calibrate.calibrate` finds them for an
    average. The paper's text was not available when this was written: where its figures and the code differ (windows
    of 2 × 2 against 3 × 3), this follows the code.

    Differs from the official code: each view merges its own number of windows (see ``shared_merge``); attention rows
    are recomputed in fp32 for the text rows alone; batches, padding, beams and second turns work; every image of a
    prompt is filtered (officially the first, later ones count as text); decoded tokens continue the numbering of each
    layer's prompt (officially the length of the cleared cache, which puts up to the last few dozen prompt tokens into
    a new token's future: see ``official_decode``). Towers without a CLS token take the attention that each patch
    receives, and windows that stick out of the grid stay unmerged (ours). Where the projector joins several patches to a
    token (Qwen2-VL), or the model pools them behind the tower (videos), merging in the tower would tear these groups
    apart: there windows of the tokens that the language model would get are merged (ENTRY, ours), a mean stands at its
    window's centre, and a token's rank for the key set is the sum over its patches. Such tokens are less alike than
    patches behind the first vision layer, so ``similarity`` wants to be found anew.

    Args:
        keep: budget mode (ours): layer-averaged visual tokens per image, or their share, instead of thresholds. The
            counts behind the filters fall evenly to 4/7 of the first one, and tokens are ranked by the larger of their
            two margins over the thresholds. Key tokens stay in any case; a budget that cannot hold them is refused
            when the image is seen.
        preset: published pair of thresholds, named by its average on LLaVA-1.5-7B: 192, 128 or 64.
        gamma, alpha: the thresholds themselves, instead of the preset's. With either at 0 nothing is ever dropped.
        layers: decoder layers (0-based) with a filter behind; None: 2, 6, 10 and 14 of 32, scaled to the depth.
        merge: whether to merge windows.
        window: side of the windows, in patches, or in tokens where these are merged.
        similarity: mean cosine from which on a window is merged.
        key_rate: share of the tokens left after merging that can never be dropped, rounded up.
        clear_cache: the third stage.
        shared_merge: as in the official code, all views of a call merge as many windows as the least mergeable one.
        official_flat: tiled images as in the official code: view after view, merged windows first in each, no newlines;
            for pictures that fill their tiles, since the model has no places for padding.
        official_decode: the released positions of decoded tokens, for conformance; needs contiguous positions.
    """

    keep: int | float | None = None
    preset: int = 192
    gamma: float | None = None
    alpha: float | None = None
    layers: tuple[int, ...] | None = None
    merge: bool = True
    window: int = 3
    similarity: float = 0.8
    key_rate: float = 0.08
    clear_cache: bool = True
    shared_merge: bool = False
    official_flat: bool = False
    official_decode: bool = False

    summary: ClassVar[str] = (
        "alike windows merged, then text-guided filters between decoder layers, then a smaller cache"
    )
    paper: ClassVar[str] = "arXiv 2411.10803"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.TOWER, Stage.ENTRY, Stage.PREFILL, Stage.CACHE})
    query_aware: ClassVar[bool] = True
    fixed_budget: ClassVar[bool] = False
    joins_patches: ClassVar[bool] = True

    def validate(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        if self.preset not in PRESETS:
            raise ValueError(f"preset is one of {', '.join(map(str, PRESETS))}, not {self.preset!r}.")
        for name in ("gamma", "alpha"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value >= 0):
                raise ValueError(f"{name} is a threshold on attention, at least 0, not {value!r}.")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))  # lists come back from a saved configuration
            if not self.layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers are decoder layers from 0 up, ascending, not {self.layers}.")
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 2:
            raise ValueError(f"window is the side of a window in patches, at least 2, not {self.window!r}.")
        if not 0 < self.key_rate <= 1:
            raise ValueError(f"key_rate lies in (0, 1], so that something always stays, not {self.key_rate}.")

    def check_family(self, adapter: Adapter) -> None:
        layers, depth = self.filters(len(adapter.decoder_layers)), len(adapter.decoder_layers)
        if layers[-1] >= depth - 1:
            raise ValueError(
                f"A filter behind layer {layers[-1]} saves nothing: this language model has {depth} layers."
            )
        if self.official_flat and (not adapter.tiled or adapter.joins_patches or not adapter.has_cls):
            raise ValueError("official_flat is the code's sequence for LLaVA-NeXT; this family has no such views.")
        if isinstance(self.keep, float):
            least = 1 / self.window**2 if self.merge else 1.0
            lowest = least * (layers[0] + 1 + self.key_rate * (depth - layers[0] - 1)) / depth
            if self.keep < lowest:
                raise ValueError(
                    f"keep={self.keep} is below what the layers up to {layers[0]} and the key set take at least, "
                    f"{lowest:.3f}; lower key_rate or filter earlier."
                )

    def filters(self, depth: int) -> tuple[int, ...]:
        """Decoder layers (0-based) with a filter behind."""
        if self.layers is not None:
            return self.layers
        return tuple(sorted({round(x * depth / DEPTH) for x in LAYERS}))

    @property
    def thresholds(self) -> tuple[float, float]:
        """(gamma, alpha) in force."""
        gamma, alpha = PRESETS[self.preset]
        return gamma if self.gamma is None else self.gamma, alpha if self.alpha is None else self.alpha

    # TOWER ------------------------------------------------------------------------------------------------------
    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        last = adapter.global_layers[-1]
        return {0, last} if (self.merge or self.official_flat) and not adapter.joins_patches else {last}

    def tower(self, layer: TowerLayer, state: dict) -> TowerEdit | None:
        behind = layer.group > 1 or layer.layout.pooling is not None
        if layer.index == layer.global_layers[-1]:
            received, present = self._received(layer, state)
            state["key"] = self._key_set(received, present)
            if behind and self.merge:
                state["received"] = received
            return None
        cells = layer.layout.view_grid[0] * layer.layout.view_grid[1]
        if behind or layer.n != cells:
            return None
        merged = None
        if self.merge:
            state["flops"] = state.get("flops", 0) + 4 * layer.patches.numel()
            window = (self.window, self.window)
            merged = merge_windows(
                layer.patches, layer.layout.view_grid, window, self.similarity, shared=self.shared_merge
            )
        if merged is None:
            return TowerEdit(layer.ids, valid=layer.valid, flat=True) if self.official_flat else None
        return TowerEdit(
            merged.keep, hidden=merged.hidden, valid=merged.valid, owner=merged.owner, flat=self.official_flat
        )

    def _received(self, layer: TowerLayer, state: dict) -> tuple[Tensor, Tensor]:
        """[V, N] per view and original cell: the attention that its token gets, 0 where none is, and where one is."""
        if layer.has_cls:
            row, queries = layer.cls_row(), 1
        else:
            row, queries = received_attention(layer.q, layer.k, layer.scale, layer.bias, layer.valid), layer.n
        state["flops"] = state.get("flops", 0) + 2 * queries * layer.k.numel()
        row, ids, valid = layer.per_token(row), layer.token_ids, layer.token_valid
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        cells = layer.layout.view_grid[0] * layer.layout.view_grid[1]
        ids = ids.masked_fill(~valid, cells)  # padding may point anywhere
        table = row.new_zeros(len(row), cells + 1)
        return (table.scatter(1, ids, row)[:, :-1], table.bool().scatter(1, ids, True)[:, :-1])

    def _key_set(self, received: Tensor, present: Tensor) -> Tensor:
        """[V, N] bool: which of the ``present`` cells may never be dropped."""
        counts = [math.ceil(self.key_rate * n) for n in present.sum(1).tolist()]
        return top_mask(received.masked_fill(~present, float("-inf")), counts)

    # ENTRY ------------------------------------------------------------------------------------------------------
    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        received = state.pop("received", None)
        if received is None:
            return None
        state["flops"] += 4 * tokens.embedded.numel()
        found = merged_windows(tokens, self.window, self.similarity, shared=self.shared_merge)
        if found is None:
            return None
        selection, home = found
        cells = torch.arange(home.shape[1], device=home.device)
        stays = tokens.view_cells() & (home == cells)
        state["key"] = self._key_set(torch.zeros_like(received).scatter_add(1, home, received), stays)
        return selection

    # PREFILL ----------------------------------------------------------------------------------------------------
    def cut_layers(self, adapter: Adapter) -> Collection[int]:
        return self.filters(len(adapter.decoder_layers))

    def prefill(self, layer: PrefillLayer, state: dict) -> Cut | None:
        _, valid = layer.frame.slots()
        key = layer.layout.of_views(state["key"], fill=False).gather(1, layer.tokens()) & valid
        counts = None
        if self.keep is not None:
            counts = self._budget(layer, key.sum(1).tolist(), state)
            if counts == layer.frame.counts:
                return None
        elif 0 in self.thresholds:
            return None
        margin = self.margin(layer)
        state["flops"] = state.get("flops", 0) + layer.flops
        if "scores" not in state:
            state["scores"] = layer.ranking(margin)
        if counts is None:
            return layer.keep((margin >= 1) | key)
        return layer.keep(top_mask(margin.masked_fill(key, float("inf")), counts), counts)

    def margin(self, layer: PrefillLayer) -> Tensor:
        """[I, c_max] fp32: how far a token lies above the nearer threshold; from 1 up it stays.

        Section 3 of the official filter reads: drop where the sum over text rows is below gamma of all tokens' sum and
        the maximum is below alpha. The larger of the two quotients says the same and ranks tokens for a budget.
        """
        gamma, alpha = (max(t, torch.finfo(torch.float32).tiny) for t in self.thresholds)
        parts = [(a.sum(1), a.amax(1)) for a in layer.mean_attention(layer.instruction_rows())]
        total = layer.of_images(torch.stack([s for s, _ in parts]).sum(0))
        most = layer.of_images(torch.stack([m for _, m in parts]).amax(0))
        # compared as written and not as quotients, so that equality with a threshold keeps the token
        mass = gamma * total.sum(1, keepdim=True)
        margin = torch.maximum(total / mass.clamp_min(torch.finfo(torch.float32).tiny), most / alpha)
        stays = (total >= mass) | (most >= alpha)
        return torch.where(stays, margin.clamp_min(1.0), margin.clamp_max(1.0 - 2**-23))

    def _budget(self, layer: PrefillLayer, keys: list[int], state: dict) -> list[int]:
        """Tokens of each image behind this filter; all filters are planned at the first one."""
        filters = self.filters(layer.depth)
        if "plan" not in state:
            state["plan"] = [self._plan(layer, i, filters, k) for i, k in enumerate(keys)]
        stage = filters.index(layer.index)
        return [min(plan[stage], n) for plan, n in zip(state["plan"], layer.frame.counts, strict=True)]

    def _plan(self, layer: PrefillLayer, image: int, filters: tuple[int, ...], keys: int) -> list[int]:
        n, original = layer.frame.counts[image], layer.layout.n[image]
        average = self.keep if isinstance(self.keep, int) else self.keep * original
        counts = self.counts(n, layer.depth, average, keys)
        if counts is None:
            seen = filters[0] + 1
            lowest = (seen * n + (layer.depth - seen) * keys) / layer.depth
            raise ValueError(
                f"keep={self.keep} is below the {math.ceil(lowest)} tokens that this image's first {seen} layers and "
                f"its key set of {keys} average to; raise keep, or lower key_rate."
            )
        return counts

    def counts(self, n: int, depth: int, average: float, keys: int = 1) -> list[int] | None:
        """Tokens behind each filter when ``n`` enter a language model of ``depth`` layers; None: too small a budget."""
        filters = self.filters(depth)
        if average >= n:
            return [n] * len(filters)
        spans = [b - a for a, b in pairwise((*filters, depth - 1))]
        weights = [1 + (len(filters) - 1 - i) / len(filters) for i in range(len(filters))]
        return declining_counts(average * depth - n * (filters[0] + 1), spans, weights, min(keys, n), n)

    # CACHE ------------------------------------------------------------------------------------------------------
    def settle(self, layer: CacheLayer, state: dict) -> Eviction | None:
        if not self.clear_cache or layer.index < self.filters(layer.depth)[0]:
            return None
        return output_aware(layer, official_decode=self.official_decode)
