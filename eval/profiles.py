# SPDX-License-Identifier: Apache-2.0
"""Token profiles read off the ledger: what every sample of a forward pass cost, with and without compression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .flops import ModelShape, Profile

if TYPE_CHECKING:
    from ..ledger import ImageRecord, VisualTokens
    from ..tokens import Layout


def compressed(shape: ModelShape, ledger: VisualTokens) -> list[Profile]:
    """The token profile of every sample of one forward pass, read off the ledger.

    A ledger without ``tower_tokens`` stands for a tower that no method touched.
    """
    layout, samples = ledger.layout, ledger.samples
    owned = _views_of_samples(layout, len(samples))
    layers = _tower_by_view(shape, ledger, owned)
    pairs = [counts.tolist() for counts in ledger.tower_pairs]
    if not pairs:
        pairs = [[n * n for n in row] for row in layers] if ledger.tower_tokens else shape.native_pairs(layout)
    found = []
    for row, (sample, mine) in enumerate(zip(samples, owned, strict=True)):
        own = [(i, image) for i, image in zip(_images_of(layout, row), sample.images, strict=True) if _first(layout, i)]
        found.append(
            Profile(
                visual=tuple(sample.layer_tokens),
                text=sample.text_tokens,
                **_tower_sums(layers, pairs, mine),
                projected=sum(_projected(shape, ledger, i, image) for i, image in own)
                + _side_tokens(shape, layers, mine),
                compressor=ledger.compressor_flops / len(samples),
            )
        )
    return found


def _projected(shape: ModelShape, ledger: VisualTokens, number: int, image: ImageRecord) -> int:
    """Rows that the projector takes of one image or video: all, where the model pools behind it, or the chosen ones."""
    layout = ledger.layout
    if shape.whole_projector:
        return image.n_original
    owners, chosen = layout.view_image.tolist(), int((~image.is_newline[image.kept]).sum())
    if ledger.selection is None:
        # nothing was dropped before it: it also takes what the model crops from padded tiles behind it
        chosen = sum(n for n, i in zip(layout.view_sizes, owners, strict=True) if i == layout.source[number])
    if layout.projected and (
        whole := sum(n for n, i in zip(layout.projected, owners, strict=True) if i == layout.source[number])
    ):
        return whole + chosen * layout.chosen_again
    return chosen


def _images_of(layout: Layout, row: int) -> list[int]:
    return [i for i, sample in enumerate(layout.sample) if sample == row]


def _first(layout: Layout, image: int) -> bool:
    """Whether a placed image is the first copy of what the tower saw: rows that share an image (beams) pay once."""
    return layout.source.index(layout.source[image]) == image


def _views_of_samples(layout: Layout, samples: int) -> list[list[int]]:
    """The views whose pass through the tower each sample pays for."""
    rows = [layout.sample[layout.source.index(i)] if i in layout.source else None for i in layout.view_image.tolist()]
    return [[view for view, owner in enumerate(rows) if owner == row] for row in range(samples)]


def _tower_by_view(shape: ModelShape, ledger: VisualTokens, owned: list[list[int]]) -> list[list[float]]:
    """Tokens of every view in every vision layer; ``owned``: the views of each sample."""
    views = len(ledger.layout.view_image)
    if ledger.tower_tokens:
        recorded = zip(ledger.tower_tokens, ledger.tower_views, strict=True)
        layers = [[n / views] * views if own is None else own.tolist() for n, own in recorded]
        # a tower that does not pack pads the views of a picture to their longest; alone it would, so that is computed
        padded = [] if ledger.tower_pairs else [mine for mine in owned if mine]
        for counts in layers:
            for mine in padded:
                longest = max(counts[view] for view in mine)
                for view in mine:
                    counts[view] = longest
        return layers
    return [list(map(float, shape.native_views(ledger.layout)))] * shape.tower.layers


def _side_tokens(shape: ModelShape, layers: list[list[float]], views: list[int]) -> float:
    """Tokens of ``views`` that pass a projector in the tower's middle: what its layer leaves to the next one."""
    last = len(layers) - 1
    return sum(layers[min(layer + 1, last)][v] for layer in shape.side_layers for v in views) / shape.group


def _tower_sums(layers: list[list[float]], pairs: list[list[float]], views: list[int]) -> dict[str, Any]:
    if not views:
        return {}
    return {
        "views": len(views),
        "tower": tuple(sum(counts[v] for v in views) for counts in layers),
        "tower_pairs": tuple(sum(counts[v] for v in views) for counts in pairs),
    }


def cache_entries(ledger: VisualTokens) -> list[list[float]]:
    """Real tokens (padding left out) that each decoder layer's cache holds after the prefill, for every sample."""
    entries: list[list[float]] = [[n + sample.text_tokens for n in sample.layer_tokens] for sample in ledger.samples]
    if ledger.cache_lengths is None:
        return entries
    # a CACHE method cut further: the stored length counts padding too, so it only ever lowers a sample's own number
    return [[min(n, held) for n, held in zip(row, ledger.cache_lengths, strict=True)] for row in entries]


def uncompressed(shape: ModelShape, ledger: VisualTokens) -> list[Profile]:
    """What the same samples cost when every token of theirs goes all the way."""
    return stock(shape, ledger.layout, [sample.text_tokens for sample in ledger.samples])


def stock(shape: ModelShape, layout: Layout, text: Sequence[float]) -> list[Profile]:
    """The token profile of every sample of a placed ``layout`` in the stock model, ``text`` tokens beside its images."""
    native = shape.native_views(layout)
    layers, pairs = [list(map(float, native))] * shape.tower.layers, shape.native_pairs(layout)
    views, sizes = _views_of_samples(layout, len(text)), layout.view_sizes
    rows = [whole or n for whole, n in zip(layout.projected or [0] * len(sizes), sizes, strict=True)]
    found = []
    for row, (words, mine) in enumerate(zip(text, views, strict=True)):
        found.append(
            Profile(
                visual=(sum(layout.n[i] for i in _images_of(layout, row)),) * shape.text.layers,
                text=words,
                **_tower_sums(layers, pairs, mine),
                projected=sum(rows[v] for v in mine) + _side_tokens(shape, layers, mine),
            )
        )
    return found
