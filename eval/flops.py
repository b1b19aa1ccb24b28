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
The compressor's own cost is inside every convention. This module needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..tokens import VisualTokens

#: text models whose layer is attention plus a gated feed-forward block of three matrices
GATED_TEXT = ("gemma", "llama", "mistral", "phi3", "qwen2", "qwen3")
#: families of one plain tower per view and a projector of two linear layers
LLAVA_LIKE = ("llava", "llava_next")
#: vision towers whose layer is attention plus a plain feed-forward block of two matrices, with (1) or without (0) CLS
PLAIN_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}


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
    ``tower_tokens``: tokens of one view in the tower at its native resolution, the ``tower_prefix`` CLS included.
    """

    text: Stack
    vocab: int
    tower: Stack
    tower_tokens: int
    tower_prefix: int
    patch_inputs: int
    projector: tuple[tuple[int, int], ...]

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the shape off a Hugging Face config; ``ValueError`` for a family whose cost is not known here."""
        if config.model_type not in LLAVA_LIKE:
            known = ", ".join(LLAVA_LIKE)
            raise ValueError(f"The FLOPs of the model family '{config.model_type}' are not known: {known} are.")
        text, vision = config.text_config, config.vision_config
        if text.model_type not in GATED_TEXT:
            raise ValueError(
                f"The FLOPs of the text model '{text.model_type}' are not known: {', '.join(GATED_TEXT)} are."
            )
        if vision.model_type not in PLAIN_TOWERS:
            known = ", ".join(PLAIN_TOWERS)
            raise ValueError(f"The FLOPs of the vision tower '{vision.model_type}' are not known: {known} are.")
        prefix = PLAIN_TOWERS[vision.model_type]
        layers_read = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
        return cls(
            text=_stack(text, gated=True),
            vocab=text.vocab_size,
            tower=_stack(vision, gated=False),
            tower_tokens=(vision.image_size // vision.patch_size) ** 2 + prefix,
            tower_prefix=prefix,
            patch_inputs=vision.num_channels * vision.patch_size**2,
            projector=(
                (vision.hidden_size * layers_read, text.hidden_size),
                (text.hidden_size, text.hidden_size),
            ),
        )

    def kv_bytes(self, entries: Sequence[float], bytes_per_number: float) -> float:
        """Bytes of keys and values when decoder layer l holds ``entries[l]`` tokens."""
        return sum(entries) * 2 * self.text.kv_heads * self.text.head_dim * bytes_per_number


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
    included, that vision layer l processes, summed over ``views`` equal views; ``projected``: tokens that pass the
    projector; ``compressor``: floating-point operations that the method adds.
    """

    visual: tuple[float, ...]
    text: float = 0
    tower: tuple[float, ...] = ()
    views: int = 0
    projected: float = 0
    compressor: float = 0

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
        tower += sum(profile.views * shape.tower.layer_flops(n / profile.views) for n in profile.tower)
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
    layers = ledger.tower_tokens or [len(ledger.layout.view_image) * shape.tower_tokens] * shape.tower.layers
    samples = ledger.samples
    owner_of_view = ledger.layout.view_image.tolist()
    views = [sum(ledger.layout.sample[i] == row for i in owner_of_view) for row in range(len(samples))]
    all_views = max(1, len(owner_of_view))
    found = []
    for sample, mine in zip(samples, views, strict=True):
        entered = sum(int((~image.is_newline[image.kept]).sum()) for image in sample.images)
        found.append(
            Profile(
                visual=tuple(sample.layer_tokens),
                text=sample.text_tokens,
                tower=tuple(n * mine / all_views for n in layers) if mine else (),
                views=mine,
                projected=entered,
                compressor=ledger.compressor_flops / len(samples),
            )
        )
    return found


def cache_entries(ledger: VisualTokens) -> list[list[float]]:
    """Real tokens (padding left out) that each decoder layer's cache holds after the prefill, for every sample."""
    entries: list[list[float]] = [[n + sample.text_tokens for n in sample.layer_tokens] for sample in ledger.samples]
    if ledger.cache_lengths is None:
        return entries
    # a CACHE method cut further: the stored length counts padding too, so it only ever lowers a sample's own number
    return [[min(n, held) for n, held in zip(row, ledger.cache_lengths, strict=True)] for row in entries]


def uncompressed(shape: ModelShape, ledger: VisualTokens) -> list[Profile]:
    """What the same samples cost when every token of theirs goes all the way."""
    found = []
    for row, profile in enumerate(profiles(shape, ledger)):
        images = ledger.samples[row].images
        n = sum(image.n_original for image in images)
        views = sum(ledger.layout.sample[i] == row for i in ledger.layout.view_image.tolist())
        found.append(
            replace(
                profile,
                visual=(n,) * len(profile.visual),
                tower=(views * shape.tower_tokens,) * shape.tower.layers,
                views=views,
                projected=views * (shape.tower_tokens - shape.tower_prefix),
                compressor=0,
            )
        )
    return found
