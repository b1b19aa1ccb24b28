# SPDX-License-Identifier: Apache-2.0
"""Decoding behind a long prompt: milliseconds per token and bytes of the cache, per cache policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Cache, CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from ..attach import compress
from ..hooks.decoder import cache_keyword
from ..method import Method
from .latency import Timing, interleaved, milliseconds

IMAGE_TOKEN = 4


def build(layers: int, width: int, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA of random weights with a small tower, 576 visual tokens, and heads of 128 that share nothing."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=width // 128,
        vocab_size=1024, max_position_embeddings=16384,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).to(device, dtype).eval()


def prompt(tokens: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """``tokens`` in all, of which 576 are those of one picture of noise."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(5, 1024, (1, tokens - 576), generator=generator)
    ids = torch.cat([text[:, :32], torch.full((1, 576), IMAGE_TOKEN), text[:, 32:]], 1).to(device)
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(device, dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def cache_bytes(cache: Cache) -> int:
    """Bytes that the keys and values of a cache take."""
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


@torch.no_grad()
def measure(
    methods: Mapping[str, Method], *, tokens: int, layers: int, width: int, rounds: int, steps: int, device: str,
    dtype: torch.dtype, tick: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """Per case (``full`` and every method): prefill and decode times, cache bytes, and ratios to ``full``.

    Every case decodes behind its own cache; rounds of ``steps`` tokens are interleaved, so that drift of the machine
    meets all cases alike. The methods' own work is inside the clock, putting them on is outside.
    """
    model = build(layers, width, device, dtype)
    inputs = prompt(tokens, device, dtype)
    keyword = cache_keyword(model)
    caches: dict[str, Cache] = {}
    found: dict[str, dict[str, Any]] = {}
    token = torch.full((1, 1), 7, device=device)

    def attached(name: str):
        return compress(model, methods[name]) if name in methods else None

    for name in ("full", *methods):
        caches[name] = DynamicCache(config=model.config.get_text_config())
        handle = attached(name)
        took = milliseconds(lambda name=name: model(**inputs, **{keyword: caches[name]}, logits_to_keep=1), device)
        found[name] = {"prefill_ms": took, "cache_bytes_after_prompt": cache_bytes(caches[name])}
        if handle is not None:
            report = handle.report()
            found[name] |= {"reported_bytes": report.kv_bytes, "visual": report.kv_visual, "text": report.kv_text}
            handle.remove()
        tick()

    def case(name: str) -> Callable[[], float]:
        def decode() -> None:
            for _ in range(steps):
                position = torch.full((1, 1), caches[name].get_seq_length(), device=device)
                model(input_ids=token, position_ids=position, **{keyword: caches[name]})

        def run() -> float:
            handle = attached(name)
            took = milliseconds(decode, device) / steps
            if handle is not None:
                handle.remove()
            tick()
            return took

        return run

    clocks = interleaved({name: case(name) for name in caches}, rounds=rounds, warmup=1)
    whole = Timing.of(clocks["full"]).median
    for name, cache in caches.items():
        timing = Timing.of(clocks[name])
        found[name] |= {
            "decode_ms_per_token": timing.as_dict(),
            "cache_bytes": cache_bytes(cache),
            "decode_speedup": whole / timing.median,
        }
    for name in caches:
        found[name]["cache_share"] = found[name]["cache_bytes"] / found["full"]["cache_bytes"]
    return found
