# SPDX-License-Identifier: Apache-2.0
"""Reference cases of a plain language model (embeddings with a span of visual tokens) inside the stock LLaVA class.

The case's weights become the text model of a ``LlavaForConditionalGeneration`` with a dummy vision tower of at least as
many patches as the case has visual tokens and a projector that is the identity. An ENTRY method of the test,
:class:`Feed`, hands in the case's visual embeddings as features, so the case enters through the same public door as
pixels do: ``compress(model, Feed(embeddings) + Method(...))``. Text comes as ``inputs_embeds`` whose visual positions
hold the placeholder's embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmcompress.method import Method, Stage
from vlmcompress.views import Selection


@dataclass(frozen=True, eq=False)
class Feed(Method):
    """ENTRY: the first ``len(embeddings)`` visual tokens enter, with these embeddings."""

    embeddings: Tensor = field(default_factory=lambda: torch.zeros(1, 1))

    name: ClassVar[str] = "feed"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})

    def entry(self, tokens, state) -> Selection:
        return feed(self.embeddings)

    def options(self) -> dict:
        return {}


def feed(embeddings: Tensor) -> Selection:
    n = len(embeddings)
    return Selection(torch.arange(n)[None], [n], features=embeddings[None])


def side(n: int) -> int:
    """Rows of the dummy tower's square grid for ``n`` visual tokens."""
    return math.isqrt(n - 1) + 1


def text_config(config: dict) -> LlamaConfig:
    options = {k: v for k, v in config.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    return LlamaConfig(**options, rope_parameters=rope, max_position_embeddings=4096)


def build(config: dict, tensors: dict[str, Tensor], n: int, placeholder: int) -> LlavaForConditionalGeneration:
    """A LLaVA around the language model in ``tensors`` ("w.model.…", "w.lm_head.weight"), as the module says."""
    width = config["hidden_size"]
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=4 * side(n),
        patch_size=4,
    )  # fmt: skip
    llava = LlavaConfig(
        vision_config=vision, text_config=text_config(config), image_token_id=placeholder,
        projector_hidden_act="linear",
    )  # fmt: skip
    model = LlavaForConditionalGeneration(llava).eval()
    load_text(model, tensors)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        linear.weight.data = torch.eye(width)
        linear.bias.data.zero_()
    return model


def load_text(model: LlavaForConditionalGeneration, tensors: dict[str, Tensor]) -> None:
    weights = {k[len("w.model.") :]: v for k, v in tensors.items() if k.startswith("w.model.") and "mm_proj" not in k}
    missing, unexpected = model.model.language_model.load_state_dict(weights, strict=False)
    assert not missing
    assert all("rotary" in k for k in unexpected)
    model.lm_head.load_state_dict({"weight": tensors["w.lm_head.weight"]})


def inputs(model: LlavaForConditionalGeneration, embeds: Tensor, start: int, n: int) -> dict[str, Tensor]:
    """Model inputs for the case's ``embeds`` [1, S, D], whose visual tokens stand in ``start … start + n``."""
    token = model.get_input_embeddings()(torch.tensor(model.config.image_token_id)).detach()
    cells = side(n) ** 2
    parts = embeds[0, :start], token.expand(cells, -1), embeds[0, start + n :]
    size = model.config.vision_config.image_size
    return {"inputs_embeds": torch.cat(parts)[None], "pixel_values": torch.randn(1, 3, size, size)}


def greedy(model: LlavaForConditionalGeneration, first, tokens: Tensor) -> Tensor:
    """[len(tokens), V] logits of each step when the model is fed ``tokens`` one by one behind its prefill ``first``."""
    cache = first.past_key_values if "past_key_values" in first else first.cache
    logits = [first.logits[0, -1]]
    for token in tokens[:-1]:
        logits.append(model(input_ids=token.view(1, 1), **{cache_keyword(model): cache}, use_cache=True).logits[0, -1])
    return torch.stack(logits)


def cache_keyword(model) -> str:
    import inspect

    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
