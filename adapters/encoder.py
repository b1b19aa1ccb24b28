# SPDX-License-Identifier: Apache-2.0
"""Vision towers without a language model: CLIP pairs and plain image encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..method import Method, Stage
from .base import Adapter

_ALONE = "there is no language model behind this tower"


class EncoderAdapter(Adapter):
    """Where things are in a tower that stands alone; the defaults fit the towers of transformers.

    :attr:`tower` takes pixels [V, 3, H, W]. Methods of the stage TOWER work, up to the last layer but one: only special
    tokens or a pooling head read what comes after it.
    """

    refused: ClassVar[dict[Stage, str]] = dict.fromkeys((Stage.ENTRY, Stage.PREFILL, Stage.CACHE), _ALONE)
    joins_views: ClassVar[bool] = True
    doors: ClassVar[dict[str, str]] = {}

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        """Whether ``model`` is one of these."""
        raise NotImplementedError

    @property
    def tower(self) -> nn.Module:
        return getattr(self.model, "vision_model", self.model)

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layers

    @property
    def whole_projector(self) -> None:
        return None

    @property
    def feature_layer(self) -> int:
        return len(self.tower_layers) - 2

    @property
    def mlp_width(self) -> int:
        """Width of a layer's feed-forward block."""
        return self.tower.config.intermediate_size

    @property
    def tower_width(self) -> int:
        """Numbers per token."""
        return self.tower.config.hidden_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """(rows, columns) of a patch in pixels."""
        side = self.tower.config.patch_size
        return side, side

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        """(rows, columns) of the patches of ``pixels`` [V, 3, H, W]."""
        rows, cols = self.patch_size
        return pixels.shape[-2] // rows, pixels.shape[-1] // cols

    def embed(self, pixels: Tensor) -> Tensor:
        """[V, E] what the model makes of each view of ``pixels`` [V, 3, H, W] in the end: embeddings, or class logits."""
        if hasattr(self.model, "get_image_features"):
            found: Any = self.model.get_image_features(pixel_values=pixels)
        else:
            found = self.model(pixel_values=pixels)
        if isinstance(found, Tensor):
            return found
        for name in ("image_embeds", "logits", "pooler_output"):
            value = getattr(found, name, None)
            if value is not None:
                return value
        raise ValueError(f"{type(self.model).__name__} ends without one vector per picture: it has no pooling head.")

    @classmethod
    def supports(cls, method: type[Method] | Method) -> tuple[bool, str]:
        kind = method if isinstance(method, type) else type(method)
        if kind.resolution is not Method.resolution:
            return False, "it shrinks the pictures, which many towers that stand alone cannot read"
        return super().supports(method)

    def check_method(self, method: Method) -> None:
        works, reason = self.supports(method)
        if not works:
            raise ValueError(f"'{method.name}' does not work on '{self.model_type}': {reason}.")
        if len(self.tower_layers) < 2:
            raise ValueError(f"{type(self.model).__name__} has one vision layer; there is nothing to save behind it.")

    def check_training(self) -> None:
        """Raise ``ValueError`` where gradient checkpointing would run layers without their hooks."""


def fused_projections(attention: nn.MultiheadAttention, x: Tensor) -> tuple[Any, Any, Any]:
    """Makers of q, k and v [V, H, n, d] of torch's own attention, which keeps them to itself, on its input ``x``."""

    def of(part: int):
        def make() -> Tensor:
            width = attention.embed_dim
            rows = slice(part * width, (part + 1) * width)
            bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
            made = nn.functional.linear(x, attention.in_proj_weight[rows], bias)
            return made.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

        return make

    return of(0), of(1), of(2)


def is_tower(model: nn.Module, types: tuple[str, ...]) -> bool:
    """Whether ``model`` is of transformers, of one of these ``config.model_type``, and holds a vision tower."""
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in types:
        return False
    return hasattr(getattr(model, "vision_model", model), "encoder")


def comes_from(model: Any, package: str) -> bool:
    """Whether the class of ``model`` is defined in ``package``, which need not be installed."""
    return any(cls.__module__.partition(".")[0] == package for cls in type(model).__mro__)
