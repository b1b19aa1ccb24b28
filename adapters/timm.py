# SPDX-License-Identifier: Apache-2.0
"""Vision transformers of timm, alone or as the trunk of an open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..registry import register_encoder
from .encoder import EncoderAdapter, comes_from


@register_encoder("timm")
class TimmAdapter(EncoderAdapter):
    """``timm.models.vision_transformer.VisionTransformer``: DeiT, ViT, SigLIP, DINOv2 and others of that class."""

    @classmethod
    def claims(cls, model: nn.Module) -> bool:
        return comes_from(getattr(getattr(model, "visual", model), "trunk", model), "timm")

    @property
    def tower(self) -> nn.Module:
        return getattr(getattr(self.model, "visual", self.model), "trunk", self.model)

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        return self.tower.blocks

    @property
    def mlp_width(self) -> int:
        return self.tower_layers[0].mlp.fc1.out_features

    @property
    def tower_width(self) -> int:
        return self.tower.embed_dim

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.tower.patch_embed.patch_size

    @property
    def has_cls(self) -> bool:
        return self.tower.cls_token is not None

    @property
    def tower_prefix(self) -> int:
        return self.tower.num_prefix_tokens

    @property
    def tower_heads(self) -> int:
        return self._attention(0).num_heads

    @property
    def tower_qk_norm(self) -> bool:
        return not isinstance(self._attention(0).q_norm, nn.Identity)

    @property
    def tower_scale(self) -> float:
        return self._attention(0).scale

    def _attention(self, index: int) -> Any:
        return self.tower_layers[index].attn

    def tower_norm(self, index: int) -> nn.Module:
        return self.tower_layers[index].norm1

    def tower_masked(self, index: int) -> nn.Module:
        return self._attention(index)

    def masked_arguments(self, args: tuple, kwargs: dict, mask: Tensor | None) -> tuple[tuple, dict]:
        return args, kwargs if mask is None else {**kwargs, "attn_mask": mask}

    def tower_projections(self, index: int) -> dict[str, nn.Module]:
        return {"qkv": self._attention(index).qkv}

    def split_qkv(self, index: int, taps: dict[str, Any]) -> tuple[Any, Any, Any]:
        attention = self._attention(index)
        q, k, v = taps["qkv"].unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return (lambda: attention.q_norm(q)), (lambda: attention.k_norm(k)), v

    def embed(self, pixels: Tensor) -> Tensor:
        return getattr(self.model, "encode_image", self.model)(pixels)

    def check_method(self, method) -> None:
        blocks = getattr(self.tower, "blocks", ())
        plain = len(blocks) and all(type(getattr(b, "attn", None)).__name__ == "Attention" for b in blocks)
        if type(self.tower).__name__ != "VisionTransformer" or not plain:
            raise ValueError(
                f"{type(self.tower).__name__} is no plain vision transformer of timm (class VisionTransformer with its own "
                "attention), which is what the family 'timm' serves."
            )
        super().check_method(method)

    def check_training(self) -> None:
        if self.tower.grad_checkpointing and self.model.training:
            raise ValueError(
                "Gradient checkpointing of timm runs layers once more without their hooks; switch it off to train a "
                "compressed tower."
            )
