# SPDX-License-Identifier: Apache-2.0
"""Tiny image encoders of random weights; those of CLIP's build share one set of weights over three libraries."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

SIDE, PATCH, WIDTH, LAYERS, HEADS = 48, 8, 32, 4, 4


def clip(side: int = SIDE, width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS):
    """A CLIP tower with projection of transformers, its weights drawn large."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=side, patch_size=PATCH, projection_dim=16,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def open_clip_tower(side: int = SIDE, width: int = WIDTH, layers: int = LAYERS, heads: int = HEADS):
    """The same tower in open_clip, as a whole CLIP pair."""
    model = open_clip.model.CLIP(
        embed_dim=16, quick_gelu=True, text_cfg={"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1},
        vision_cfg={
            "image_size": side, "layers": layers, "width": width, "head_width": width // heads, "patch_size": PATCH,
            "mlp_ratio": 2.0,
        },
    ).eval()  # fmt: skip
    theirs = clip(side, width, layers, heads).state_dict()
    names = {
        "class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }  # fmt: skip
    ours = {name: theirs[f"vision_model.{source}"] for name, source in names.items()}
    ours["proj"] = theirs["visual_projection.weight"].T
    _copy(ours, theirs, {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"})
    parts = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "ln_1": "layer_norm1", "ln_2": "layer_norm2"}  # fmt: skip
    for layer in range(layers):
        _copy(ours, theirs, parts, f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}.")
        for part in ("weight", "bias"):
            ours[f"transformer.resblocks.{layer}.attn.in_proj_{part}"] = _joined(theirs, layer, part)
    model.visual.load_state_dict(ours)
    return model


def timm_tower():
    """The same tower in timm, its projection as the head."""
    model = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, num_classes=16, embed_dim=WIDTH, depth=LAYERS, num_heads=HEADS, mlp_ratio=2,
        pre_norm=True, act_layer=QuickGELU,
    ).eval()  # fmt: skip
    model.head = nn.Linear(WIDTH, 16, bias=False)
    theirs = clip().state_dict()
    place = theirs["vision_model.embeddings.position_embedding.weight"]
    ours = {
        "cls_token": theirs["vision_model.embeddings.class_embedding"].view(1, 1, -1), "pos_embed": place[None],
        "patch_embed.proj.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
        "head.weight": theirs["visual_projection.weight"],
    }  # fmt: skip
    _copy(ours, theirs, {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"})
    parts = {"attn.proj": "self_attn.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "norm1": "layer_norm1",
             "norm2": "layer_norm2"}  # fmt: skip
    for layer in range(LAYERS):
        _copy(ours, theirs, parts, f"blocks.{layer}.", f"encoder.layers.{layer}.")
        for part in ("weight", "bias"):
            ours[f"blocks.{layer}.attn.qkv.{part}"] = _joined(theirs, layer, part)
    # timm's norms add 1e-6, CLIP's 1e-5
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert not unexpected and set(missing) <= {"patch_embed.proj.bias"}
    if model.patch_embed.proj.bias is not None:
        nn.init.zeros_(model.patch_embed.proj.bias)
    return model


def siglip():
    """A SigLIP tower of transformers: no CLS token, a pooling head."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=SIDE,
        patch_size=PATCH,
    )  # fmt: skip
    return SiglipVisionModel(config).eval()


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "clip": clip, "open_clip": open_clip_tower, "timm": timm_tower, "siglip": siglip,
}  # fmt: skip


def _copy(ours: dict, theirs: dict, names: dict[str, str], mine: str = "", source: str = "") -> None:
    for name, other in names.items():
        for part in ("weight", "bias"):
            ours[f"{mine}{name}.{part}"] = theirs[f"vision_model.{source}{other}.{part}"]


def _joined(theirs: dict, layer: int, part: str) -> torch.Tensor:
    return torch.cat([theirs[f"vision_model.encoder.layers.{layer}.self_attn.{name}_proj.{part}"] for name in "qkv"])


def frames(videos: int = 2, count: int = 4, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    """[videos, count, 3, side, side]: neighbouring frames look alike."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(videos, 1, 3, side, side, generator=generator)
    return base + 0.3 * torch.randn(videos, count, 3, side, side, generator=generator)
