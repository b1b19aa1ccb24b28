# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of open_clip, alone or as the ``visual`` of a CLIP pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..registry import register_encoder
from .encoder import EncoderAdapter, comes_from, fused_projections


@register_encoder("open_clip")
class OpenClipAdapter(EncoderAdapter):
    """``open_clip.CLIP``, ``CustomTextCLIP``, ``CoCa`` or their ``VisionTransformer``; timm towers: the family 'timm'."""

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        tower = getattr(model, "visual", model)
        return comes_from(tower, "open_clip") and not hasattr(tower, "trunk")

    @property
    def tower(self) -> nn.Module:
        return getattr(self.model, "visual", self.model)

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        return self.tower.transformer.resblocks

    @property
    def mlp_width(self) -> int:
        return self.tower_layers[0].mlp.c_fc.out_features

    @property
    def tower_width(self) -> int:
        return self._attention(0).embed_dim

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.tower.patch_size

    @property
    def tower_prefix(self) -> int:
        return 1

    @property
    def tower_heads(self) -> int:
        return self._attention(0).num_heads

    @property
    def tower_scale(self) -> float:
        return self._attention(0).head_dim ** -0.5

    def _attention(self, index: int) -> nn.MultiheadAttention:
        return self.tower_layers[index].attn

    def tower_norm(self, index: int) -> nn.Module:
        return self.tower_layers[index].ln_1

    def tower_masked(self, index: int) -> nn.Module:
        return self._attention(index)

    def masked_arguments(self, args: tuple, kwargs: dict, mask: Tensor | None) -> tuple[tuple, dict]:
        # a mask per key is broadcast over heads and queries; one per query would be copied for every head
        return args, kwargs if mask is None else {**kwargs, "key_padding_mask": mask[:, 0, 0]}

    def tower_projections(self, index: int) -> dict[str, nn.Module]:
        return {"input": self.tower_norm(index)}

    def split_qkv(self, index: int, taps: dict[str, Any]) -> tuple[Any, Any, Any]:
        return fused_projections(self._attention(index), taps["input"])

    def embed(self, pixels: Tensor) -> Tensor:
        encode = getattr(self.model, "encode_image", self.model)
        found = encode(pixels)
        return found[0] if isinstance(found, tuple) else found

    def check_method(self, method) -> None:
        blocks = getattr(getattr(self.tower, "transformer", None), "resblocks", ())
        plain = len(blocks) and all(type(getattr(block, "attn", None)) is nn.MultiheadAttention for block in blocks)
        if not plain or not getattr(self.tower.transformer, "batch_first", False):
            raise ValueError(
                f"{type(self.tower).__name__} is no plain vision transformer of open_clip (blocks with torch's own attention, "
                "batch first), which is what the family 'open_clip' serves."
            )
        if getattr(self.tower, "attn_pool", None) is None and getattr(self.tower, "pool_type", "tok") == "none":
            raise ValueError("This open_clip tower returns all its patches instead of one vector per picture.")
        super().check_method(method)

    def check_training(self) -> None:
        if self.tower.transformer.grad_checkpointing and self.model.training:
            raise ValueError(
                "Gradient checkpointing of open_clip runs layers once more without their hooks; switch it off to train a "
                "compressed tower."
            )
