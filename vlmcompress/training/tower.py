# SPDX-License-Identifier: Apache-2.0
"""Stage 1: a CLIP tower whose CLS token is trained contrastively on captions, through open_clip's loss.

On the contrastive loss alone a tower of this size crawls. Heads that label every patch (colour, kind, digit, place)
beside it teach the patches in minutes, and the CLS token then has something to gather. The heads and the text side are
dropped in the end.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from .scenes import COLORS, DIGITS, SHAPES

HEAD_WEIGHTS = {"color": 0.5, "kind": 1.5, "digit": 2.0}  # digits come last of all
FEATURE_LAYER = -2  # the layer LLaVA reads; the last one serves the CLS token alone


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of the tower."""

    image_size: int = 96
    patch_size: int = 8
    hidden_size: int = 128
    layers: int = 5
    heads: int = 4

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def clip(self, tokenizer) -> CLIPConfig:
        """The CLIP pair: this tower and a small text side over the shared vocabulary."""
        vision = CLIPVisionConfig(
            hidden_size=self.hidden_size, intermediate_size=4 * self.hidden_size, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, image_size=self.image_size, patch_size=self.patch_size, projection_dim=128,
        )  # fmt: skip
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64, projection_dim=128,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)


class TowerWithHeads(nn.Module):
    """A CLIP pair with patch heads on the layer that the language model will read."""

    def __init__(self, config: TowerConfig, tokenizer):
        super().__init__()
        self.clip = CLIPModel(config.clip(tokenizer))
        _start_local(self.clip.vision_model, config)
        sizes = {"color": 1 + len(COLORS), "kind": 2 + len(SHAPES), "digit": 1 + len(DIGITS)}
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, n) for name, n in sizes.items()})
        self.place = nn.Linear(config.hidden_size, 2)
        self.contrast = ClipLoss()
        line = torch.linspace(-1, 1, config.grid)
        self.register_buffer("places", torch.cartesian_prod(line, line), persistent=False)

    def forward(self, pixel_values, **labels) -> dict[str, torch.Tensor]:
        """pixel_values [B, 3, H, W] and what `losses` takes → loss and predictions."""
        return self.losses(self.clip.vision_model(pixel_values, output_hidden_states=True), **labels)

    def losses(self, seen, caption_ids, caption_mask, color, kind, digit) -> dict[str, torch.Tensor]:
        """From what the tower returned; captions [B, T], patch labels [B, patches].

        A row whose patches are all -100 (an image without labels) counts for nothing here.
        """
        known = (color >= 0).all(1)
        image = F.normalize(self.clip.visual_projection(seen.pooler_output[known]), dim=-1)
        read = self.clip.text_model(input_ids=caption_ids[known], attention_mask=caption_mask[known])
        text = F.normalize(self.clip.text_projection(read.pooler_output), dim=-1)
        loss = self.contrast(image, text, self.clip.logit_scale.exp().clamp(max=100))
        patches = seen.hidden_states[FEATURE_LAYER][:, 1:]
        out = {}
        for name, labels in {"color": color, "kind": kind, "digit": digit}.items():
            logits = self.heads[name](patches)
            weight = logits.new_full((logits.shape[-1],), 1.0)
            weight[0] = 0.2 if name == "color" else 0.06  # most patches are background
            found = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weight)
            loss = loss + HEAD_WEIGHTS[name] * found
            out[name] = logits.argmax(-1)
        loss = loss + F.mse_loss(self.place(patches), self.places.expand(len(patches), -1, -1))
        return {"loss": loss, "image": image, "text": text, **out}


@torch.no_grad()
def _start_local(vision, config: TowerConfig) -> None:
    """Start the tower where it can find neighbours: sine-cosine places as loud as the pixels, sharper attention.

    CLIP's own start draws position embeddings ten times fainter than patch embeddings, and a tower of this size then
    needs most of its training to find out which patches touch, which it must know to tell shapes.
    """
    place, bands = vision.embeddings.position_embedding.weight, config.hidden_size // 4
    rates = (math.pi / 2) * (torch.arange(bands) / bands * math.log2(config.grid)).exp2() / config.grid
    y, x = torch.cartesian_prod(torch.arange(config.grid), torch.arange(config.grid)).float().T
    waves = [wave(axis[:, None] * rates) for axis in (x, y) for wave in (torch.sin, torch.cos)]
    place[1:] = 0.3 * torch.cat(waves, dim=1)
    for layer in vision.encoder.layers:
        layer.self_attn.q_proj.weight.mul_(2)
        layer.self_attn.k_proj.weight.mul_(2)


@torch.no_grad()
def measure_tower(model: TowerWithHeads, dataset, collator, batch_size: int = 64) -> dict[str, float]:
    """Accuracy of each head on the patches that show something, and how often an image finds its own caption."""
    model.eval()
    right, total = {"color": 0, "kind": 0, "digit": 0, "caption": 0}, {"color": 0, "kind": 0, "digit": 0, "caption": 0}
    for start in range(0, len(dataset), batch_size):
        batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        batch = {k: v.to(model.places.device) for k, v in batch.items()}
        out = model(**batch)
        for name in ("color", "kind", "digit"):
            shown = batch[name] > 0
            right[name] += int((out[name] == batch[name])[shown].sum())
            total[name] += int(shown.sum())
        best = (out["image"] @ out["text"].T).argmax(1)
        right["caption"] += int((best == torch.arange(len(best), device=best.device)).sum())
        total["caption"] += len(best)
    model.train()
    return {name: right[name] / max(total[name], 1) for name in right}
