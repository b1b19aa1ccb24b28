# SPDX-License-Identifier: Apache-2.0
"""A stock LLaVA whose only decoder layer has the queries, keys and values that a case asks for.

Token t of row b has the embedding of a unit vector of its own, so the columns of the projections are the case's vectors;
all position ids are 0, at which the rotary embedding does nothing. What a policy leaves in the cache can then be read
off the values.
"""

from __future__ import annotations

import math

import torch
from inside_llava import cache_keyword
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmcompress


class Scripted:
    """Runs ``q`` [B, H, N, d], ``k`` [B, H_kv, N, d], ``v`` (default: token t's value is unit vector t; then d = N)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None = None):
        batch, heads, n, dim = q.shape
        if v is None:
            v = torch.eye(n).expand(batch, k.shape[1], n, n)
        self.batch, self.n = batch, n
        width = -(-batch * n // heads) * heads
        text = LlamaConfig(
            vocab_size=width + 1, hidden_size=width, intermediate_size=4, num_hidden_layers=1, num_attention_heads=heads,
            num_key_value_heads=k.shape[1], head_dim=dim, rms_norm_eps=1e-12, pad_token_id=0,
        )  # fmt: skip
        vision = CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=4
        )
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=width))
        self.model = model.eval().requires_grad_(False)
        layer = self.layer = model.model.language_model.layers[0]
        model.get_input_embeddings().weight.data = torch.eye(width + 1, width)
        layer.input_layernorm.weight.data.fill_(width**-0.5)
        for name, x in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            weight = x.permute(1, 3, 0, 2).reshape(x.shape[1] * x.shape[3], batch * n)
            layer.self_attn.get_submodule(name).weight.data = torch.nn.functional.pad(weight, (0, width - batch * n))
        self.outputs: list[Tensor] = []
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda m, args: self.outputs.append(args[0].unflatten(-1, (heads, dim)).transpose(1, 2))
        )
        self.cache = DynamicCache(config=model.model.language_model.config)

    @property
    def store(self):
        return self.cache.layers[0]

    def compress(self, method, **options):
        return vlmcompress.compress(self.model, method, **options)

    def feed(self, start: int, end: int) -> Tensor:
        """Run tokens ``start`` to ``end``; returns the attention's output [B, H, q, d] before the output projection."""
        ids = torch.arange(start, end)[None] + torch.arange(self.batch)[:, None] * self.n
        self.model(
            input_ids=ids, position_ids=torch.zeros_like(ids), **{cache_keyword(self.model): self.cache}, use_cache=True
        )
        return self.outputs[-1]

    def kept(self) -> Tensor:
        """[H_kv, n] tokens of row 0 in the cache, where values are unit vectors."""
        return self.store.values[0].argmax(-1)


def from_rows(rows: list[Tensor]) -> Scripted:
    """Rows of logits [H, N], one for each token, for heads that share nothing; keys are unit vectors."""
    logits = torch.stack(rows, dim=1)[None]
    n = logits.shape[2]
    return Scripted(logits * math.sqrt(n), torch.eye(n).expand(1, logits.shape[1], n, n))
