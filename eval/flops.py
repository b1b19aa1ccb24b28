# SPDX-License-Identifier: Apache-2.0
"""One FLOP counter, three named conventions, fed by a token profile (`profiles.py` reads one off the ledger).

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
The compressor's own cost is inside every convention, what cache policies spend on scoring the prompt included. This module
needs neither torch nor transformers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
            gated=vision.model_type.startswith("qwen2_5_vl"),  # transformers 5.16 does not add "_vision"
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
