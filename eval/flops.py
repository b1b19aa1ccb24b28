# SPDX-License-Identifier: Apache-2.0
"""One FLOP counter, three named conventions, fed by the ledger's own token profile.

=========  ============================================================================  =============================
name       what it counts                                                                who reports it
=========  ============================================================================  =============================
``macs``   multiply-adds of the decoder layers on visual tokens: 4nd² + 2n²d + 3ndm      TransPrune, MustDrop, FastV,
           per layer with that layer's own n, text left out                              SparseVLM
``flops``  the same with two operations per multiply-add: 8nd² + 4n²d + 6ndm              GlobalCom²
``full``   every matrix product of a prefill: vision tower, projector, text and visual   what a user pays; FlowCut
           tokens with grouped-query projections, one lm_head position, the compressor
=========  ============================================================================  =============================

d hidden width, m feed-forward width, n visual tokens. ``full`` counts attention over the whole n × n square, as torch's
own ``FlopCounterMode`` does, and leaves out norms, activations and softmax, as it does; the two agree (see the tests).
Rows that only pad a batch, in the projector or the decoder, are left out: a sample costs what it costs alone.
The compressor's own cost is inside every convention. This module needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..ledger import ImageRecord, VisualTokens
    from ..tokens import Layout

#: text models whose layer is attention plus a gated feed-forward block of three matrices
GATED_TEXT = (
    "gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3",
    "qwen3_vl_text",
)  # fmt: skip
#: families of one plain tower per view and a projector of two linear layers
LLAVA_LIKE = ("llava", "llava_next", "llava_next_video", "llava_onevision")
#: families of one plain tower per view whose projector joins or averages blocks of patches, or is a single linear layer
OTHER_PLAIN = ("gemma3", "idefics3", "internvl", "paligemma", "smolvlm")
#: families of one tower for views of any size, whose projector joins blocks of patches
QWEN_LIKE = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
#: vision towers whose layer is attention plus a plain feed-forward block of two matrices, with (1) or without (0) CLS
PLAIN_TOWERS = {
    "clip_vision_model": 1,
    "idefics3_vision": 0,
    "internvl_vision": 1,
    "siglip_vision_model": 0,
    "smolvlm_vision": 0,
}


class UnknownFlopsError(ValueError):
    """The cost of ``what``, a part of a model or all of it, is not known here."""

    def __init__(self, what: str, known: Sequence[str]):
        super().__init__(f"The FLOPs of the {what} are not known: {', '.join(known)} are.")
        self.what = what


@dataclass(frozen=True)
class Stack:
    """A stack of transformer layers: widths of one layer and how many there are."""

    layers: int
    d: int
    m: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool

    def layer_flops(self, n: float, context: float | None = None) -> float:
        """Matrix products of one layer on ``n`` tokens that attend to ``context`` entries (default: themselves)."""
        context = n if context is None else context
        projections = 2 * n * self.d * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        attention = 4 * n * context * self.heads * self.head_dim
        return projections + attention + 2 * n * self.d * self.m * (3 if self.gated else 2)


@dataclass(frozen=True)
class ModelShape:
    """The sizes that the cost of a vision-language model follows from.

    ``projector``: (in, out) of each linear layer; ``patch_inputs``: numbers in one patch (3 × 14 × 14 for CLIP-L);
    ``tower_tokens``: tokens of one view in the tower at its native resolution, the ``tower_prefix`` CLS included, or 0
    where every view has a size of its own; ``group``: patches that the projector joins to one token; ``windowed``: vision
    layers that attend inside windows; ``side_layers``: vision layers whose output passes a projector of its own too;
    ``whole_projector``: dropped tokens pass the projector too.
    """

    text: Stack
    vocab: int
    tower: Stack
    tower_tokens: int
    tower_prefix: int
    patch_inputs: int
    projector: tuple[tuple[int, int], ...]
    group: int = 1
    windowed: tuple[int, ...] = ()
    side_layers: tuple[int, ...] = ()
    whole_projector: bool = False

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the shape off a Hugging Face config; ``UnknownFlopsError`` where the cost of a part is not known here."""
        known = (*LLAVA_LIKE, *OTHER_PLAIN, *QWEN_LIKE)
        if config.model_type not in known:
            raise UnknownFlopsError(f"model family '{config.model_type}'", known)
        text, vision = config.text_config, config.vision_config
        if text.model_type not in GATED_TEXT:
            raise UnknownFlopsError(f"text model '{text.model_type}'", GATED_TEXT)
        if config.model_type in QWEN_LIKE:
            return cls._qwen(text, vision)
        if vision.model_type not in PLAIN_TOWERS:
            raise UnknownFlopsError(f"vision tower '{vision.model_type}'", tuple(PLAIN_TOWERS))
        prefix = PLAIN_TOWERS[vision.model_type]
        rows, cols = (s // p for s, p in zip(_both(vision.image_size), _both(vision.patch_size), strict=True))
        return cls(
            text=_stack(text, gated=True),
            vocab=text.vocab_size,
            tower=_stack(vision, gated=False),
            tower_tokens=rows * cols + prefix,
            tower_prefix=prefix,
            patch_inputs=vision.num_channels * math.prod(_both(vision.patch_size)),
            projector=_projector(config),
            group=_group(config, rows),
            whole_projector=config.model_type == "gemma3",
        )

    @classmethod
    def _qwen(cls, text: Any, vision: Any) -> ModelShape:
        width = getattr(vision, "embed_dim", vision.hidden_size)
        heads, group = vision.num_heads, vision.spatial_merge_size**2
        whole = getattr(vision, "fullatt_block_indexes", None)
        tower = Stack(
            layers=vision.depth,
            d=width,
            m=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
            heads=heads,
            kv_heads=heads,
            head_dim=width // heads,
            gated=vision.model_type == "qwen2_5_vl_vision",
        )
        return cls(
            text=_stack(text, gated=True),
            vocab=text.vocab_size,
            tower=tower,
            tower_tokens=0,
            tower_prefix=0,
            patch_inputs=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            projector=((group * width, group * width), (group * width, text.hidden_size)),
            group=group,
            windowed=tuple(layer for layer in range(vision.depth) if whole is not None and layer not in whole),
            side_layers=tuple(getattr(vision, "deepstack_visual_indexes", ())),
        )

    def kv_bytes(self, entries: Sequence[float], bytes_per_number: float) -> float:
        """Bytes of keys and values when decoder layer l holds ``entries[l]`` tokens."""
        return sum(entries) * 2 * self.text.kv_heads * self.text.head_dim * bytes_per_number

    def native_views(self, layout: Layout) -> list[int]:
        """Tokens of every view in a tower that no method touched, CLS included."""
        if self.tower_tokens:
            return [self.tower_tokens] * len(layout.view_image)
        return [n * self.group + self.tower_prefix for n in layout.view_sizes]

    def native_pairs(self, layout: Layout) -> list[list[float]]:
        """By vision layer: pairs of a query and a key of every view in a tower that no method touched."""
        whole = [float(n * n) for n in self.native_views(layout)]
        if layout.window is None:
            return [whole] * self.tower.layers
        cells = zip(layout.window.tolist(), layout.view_sizes, strict=True)
        inside = [float(sum((c * self.group) ** 2 for c in Counter(row[:n]).values())) for row, n in cells]
        return [inside if layer in self.windowed else whole for layer in range(self.tower.layers)]


def _both(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of what a config gives as one number or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _group(config: Any, rows: int) -> int:
    """Patches that become one token, of views of ``rows`` rows of patches."""
    if config.model_type == "internvl":
        return round(1 / config.downsample_ratio) ** 2
    if config.model_type in ("idefics3", "smolvlm"):
        return config.scale_factor**2
    return rows**2 // config.mm_tokens_per_image if config.model_type == "gemma3" else 1


def _projector(config: Any) -> tuple[tuple[int, int], ...]:
    """(in, out) of every linear layer that a visual token passes; ``UnknownFlopsError`` for a projector that mixes."""
    inputs, width = config.vision_config.hidden_size, config.text_config.hidden_size
    if getattr(config, "quecc", None):
        raise UnknownFlopsError("projector 'quecc'", ("the stock one", "tokenflex"))
    if flex := getattr(config, "tokenflex", None):
        layers = getattr(config, "vision_feature_layer", -1)
        inputs *= 1 if isinstance(layers, int) else len(layers)
        hidden = flex["hidden_ratio"] * inputs
        return (inputs, hidden), (inputs, hidden), (hidden, width)
    if config.model_type == "internvl":
        return (_group(config, 0) * inputs, width), (width, width)
    if config.model_type in ("idefics3", "smolvlm"):
        return ((_group(config, 0) * inputs, width),)
    if config.model_type in ("gemma3", "paligemma"):
        return ((inputs, width),)
    inputs *= 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    return (inputs, width), (width, width)


def kv_numbers(text: Any) -> int:
    """Numbers that one token leaves in the cache of one decoder layer, by the config of the text model."""
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * (getattr(text, "num_key_value_heads", None) or heads) * head_dim


def _stack(config: Any, *, gated: bool) -> Stack:
    heads = config.num_attention_heads
    return Stack(
        layers=config.num_hidden_layers,
        d=config.hidden_size,
        m=config.intermediate_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        gated=gated,
    )


@dataclass(frozen=True)
class Profile:
    """Tokens of one sample on their way through the model.

    ``visual[l]``: visual tokens that decoder layer l processes; ``text``: text tokens; ``tower[l]``: tokens, CLS
    included, that vision layer l processes, summed over ``views`` views; ``tower_pairs[l]``: pairs of a query and a key
    there, the sum of the views' squared lengths (left out: all views have the same length); ``projected``: tokens that
    pass the projector, those that pass one behind a layer of the tower's middle as well counted once more for each;
    ``compressor``: floating-point operations that the method adds.
    """

    visual: tuple[float, ...]
    text: float = 0
    tower: tuple[float, ...] = ()
    views: int = 0
    projected: float = 0
    compressor: float = 0
    tower_pairs: tuple[float, ...] = ()

    @property
    def mean_visual(self) -> float:
        """Layer-averaged visual tokens: what a method's budget really is."""
        return sum(self.visual) / len(self.visual)


def macs(shape: ModelShape, profile: Profile) -> float:
    """Multiply-adds on visual tokens in the decoder layers (four square projections, whatever the model has)."""
    d, m = shape.text.d, shape.text.m
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in profile.visual) + profile.compressor / 2


def flops(shape: ModelShape, profile: Profile) -> float:
    """Twice :func:`macs`: floating-point operations on visual tokens in the decoder layers."""
    return 2 * macs(shape, profile)


@dataclass(frozen=True)
class FullCount:
    """Floating-point operations of one prefill by the part that performs them."""

    tower: float
    projector: float
    decoder: float
    lm_head: float
    compressor: float

    @property
    def total(self) -> float:
        return self.tower + self.projector + self.decoder + self.lm_head + self.compressor


def full_count(shape: ModelShape, profile: Profile) -> FullCount:
    """Every matrix product of the prefill, lm_head at the last position only (as ``generate`` computes it)."""
    tower = 0.0
    if profile.views:
        patches = profile.tower[0] - profile.views * shape.tower_prefix
        tower = 2 * patches * shape.patch_inputs * shape.tower.d
        # a view attends to itself only, however many share a pack
        pairs = profile.tower_pairs or [n * n / profile.views for n in profile.tower]
        tower += sum(shape.tower.layer_flops(n, p / n) for n, p in zip(profile.tower, pairs, strict=True) if n)
    return FullCount(
        tower=tower,
        projector=sum(2 * profile.projected * a * b for a, b in shape.projector),
        decoder=sum(shape.text.layer_flops(n + profile.text) for n in profile.visual),
        lm_head=2.0 * shape.text.d * shape.vocab,
        compressor=profile.compressor,
    )


def full(shape: ModelShape, profile: Profile) -> float:
    """Sum of :func:`full_count`."""
    return full_count(shape, profile).total


def decode_step(shape: ModelShape, entries: Sequence[float]) -> float:
    """Floating-point operations of one decoded token when decoder layer l's cache holds ``entries[l]`` tokens."""
    return sum(shape.text.layer_flops(1, n + 1) for n in entries) + 2 * shape.text.d * shape.vocab


CONVENTIONS: dict[str, Callable[[ModelShape, Profile], float]] = {"macs": macs, "flops": flops, "full": full}


def profiles(shape: ModelShape, ledger: VisualTokens) -> list[Profile]:
    """The token profile of every sample of one forward pass, read off the ledger.

    A ledger without ``tower_tokens`` stands for a tower that no method touched.
    """
    layout, samples = ledger.layout, ledger.samples
    layers = _tower_by_view(shape, ledger)
    pairs = [counts.tolist() for counts in ledger.tower_pairs]
    if not pairs:
        pairs = [[n * n for n in row] for row in layers] if ledger.tower_tokens else shape.native_pairs(layout)
    found = []
    for row, (sample, mine) in enumerate(zip(samples, _views_of_samples(ledger), strict=True)):
        own = [(i, image) for i, image in zip(_images_of(layout, row), sample.images, strict=True) if _first(layout, i)]
        found.append(
            Profile(
                visual=tuple(sample.layer_tokens),
                text=sample.text_tokens,
                **_tower_sums(layers, pairs, mine),
                projected=sum(_projected(shape, layout, i, image) for i, image in own)
                + _side_tokens(shape, layers, mine),
                compressor=ledger.compressor_flops / len(samples),
            )
        )
    return found


def _projected(shape: ModelShape, layout: Layout, number: int, image: ImageRecord) -> int:
    """Rows that the projector takes of one image or video: all, where the model pools behind it, or the chosen ones."""
    if shape.whole_projector:
        return image.n_original
    owners = layout.view_image.tolist()
    if layout.projected and (
        whole := sum(n for n, i in zip(layout.projected, owners, strict=True) if i == layout.source[number])
    ):
        return whole
    return int((~image.is_newline[image.kept]).sum())


def _images_of(layout: Layout, row: int) -> list[int]:
    return [i for i, sample in enumerate(layout.sample) if sample == row]


def _first(layout: Layout, image: int) -> bool:
    """Whether a placed image is the first copy of what the tower saw: rows that share an image (beams) pay once."""
    return layout.source.index(layout.source[image]) == image


def _views_of_samples(ledger: VisualTokens) -> list[list[int]]:
    """The views whose pass through the tower each sample pays for."""
    layout, owners = ledger.layout, ledger.layout.view_image.tolist()
    rows = [layout.sample[layout.source.index(i)] if i in layout.source else None for i in owners]
    return [[view for view, owner in enumerate(rows) if owner == row] for row in range(len(ledger.samples))]


def _tower_by_view(shape: ModelShape, ledger: VisualTokens) -> list[list[float]]:
    """Tokens of every view in every vision layer."""
    if ledger.tower_views:
        return [counts.tolist() for counts in ledger.tower_views]
    views = len(ledger.layout.view_image)
    if ledger.tower_tokens:
        # a tower that does not pack pads its views to the longest, and the padding is computed too
        return [[n / views] * views for n in ledger.tower_tokens]
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
    native = shape.native_views(ledger.layout)
    layers, pairs = [list(map(float, native))] * shape.tower.layers, shape.native_pairs(ledger.layout)
    views, sizes = _views_of_samples(ledger), ledger.layout.view_sizes
    rows = [whole or n for whole, n in zip(ledger.layout.projected or [0] * len(sizes), sizes, strict=True)]
    found = []
    for sample, mine in zip(ledger.samples, views, strict=True):
        n = sum(image.n_original for image in sample.images)
        found.append(
            Profile(
                visual=(n,) * ledger.n_layers,
                text=sample.text_tokens,
                **_tower_sums(layers, pairs, mine),
                projected=sum(rows[v] for v in mine) + _side_tokens(shape, layers, mine),
            )
        )
    return found
