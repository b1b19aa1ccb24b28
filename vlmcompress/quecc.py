# SPDX-License-Identifier: Apache-2.0
"""QueCC on stock LLaVA models: put the projector in, hand it the question, save and load without remote code.

A model has one number of tokens, fixed when it is trained. Prompts need as many placeholders for an image:
``vlmcompress.flex.set_tokens(processor, n)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from .adapters.base import adapter_for
from .checkpoints import load_with_projector
from .flex import check_replaceable, patch_grid
from .projectors import check_loaded
from .projectors.quecc import QueCCProjector, kernel_of, last_token, layers_for

#: what a sample without a question asks
FALLBACK = "image"
QUERIES = ("llm_last_token", "mean", "none")
_ENTRY = "quecc"


def install(
    model: PreTrainedModel,
    tokens: int = 36,
    *,
    layers: Sequence[int] | None = None,
    heads: int = 8,
    query: str = "llm_last_token",
    norm_eps: float = 1e-6,
    dropout: float = 0.0,
) -> QueCCProjector:
    """Replace the projector of a stock LLaVA-1.5 by a fresh QueCC projector, in place.

    Sets ``config.vision_feature_layer`` to the layers that it reads. Train it before use (stage 1: the projector alone,
    stage 2: with the language model; the tower stays frozen).

    Args:
        model: a LLaVA with a tower of fixed size, not compressed at the moment.
        tokens: visual tokens per image; 576, 144, 64, 36, 16, 9, 4 or 1 of 24 × 24 patches.
        layers: hidden states of the tower to read, ascending (0: the embeddings); the last one is also the base of the
            queries. Default: 12, 16, 22, 23 of 24 layers, and their places in other depths.
        heads: of the attention over a region; they divide the tower's width.
        query: question vector: the language model's state at the question's last token, "mean" over its tokens, or
            "none" (ablation).
        norm_eps: of the LayerNorms.
        dropout: share of the attention weights that training sets to 0.

    Raises:
        ValueError: a count that the grid does not give, layers that the tower does not have, heads that do not divide the
            width, a dropout outside [0, 1), a model of another build. The model is then as it was.
    """
    depth = model.config.vision_config.num_hidden_layers if hasattr(model.config, "vision_config") else 0
    chosen = tuple(layers) if layers is not None else layers_for(depth)
    return _attach(model, tokens, chosen, heads, query, norm_eps, dropout)


def from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """Load a model that was saved with a QueCC projector. Raises ``ValueError`` for any other checkpoint."""
    config = options.pop("config", None) or AutoConfig.from_pretrained(name)
    entry = getattr(config, _ENTRY, None)
    if not entry:
        raise ValueError(
            f"'{name}' has no QueCC projector (its configuration has no 'quecc'); load it with its own class and call "
            "vlmcompress.quecc.install."
        )
    made = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    return load_with_projector(name, config, lambda model: _attach(model, **made), **options)


@contextmanager
def query(
    model: PreTrainedModel, tokenizer: Any, questions: Sequence[str], images: Sequence[int] | None = None, *,
    fallback: str = FALLBACK,
) -> Iterator[None]:  # fmt: skip
    """Answer inside: the images of a batch are compressed for ``questions``, one per row; an empty one asks ``fallback``.

    ``images``: how many images each row has, where that is not one each: they are made into tokens before a prompt tells.
    Raises ``ValueError`` for another number of rows in ``images``.

    Needed for ``generate``, which refuses keyword arguments that it does not know. A forward pass may bring
    ``query_input_ids`` and ``query_attention_mask`` instead.
    """
    projector = _projector_of(model)
    vectors = question_vectors(model, **encode_questions(tokenizer, questions, fallback))
    if images is not None:
        if len(images) != len(questions):
            raise ValueError(f"images has {len(images)} numbers for {len(questions)} questions; name one for each row.")
        vectors = vectors.repeat_interleave(torch.tensor(images, device=vectors.device), dim=0)
    projector.ask(vectors)
    try:
        yield
    finally:
        projector.ask(None)


def encode_questions(tokenizer: Any, questions: Sequence[str], fallback: str = FALLBACK) -> dict[str, Tensor]:
    """``query_input_ids`` and ``query_attention_mask`` [B, S] of questions; empty ones become ``fallback``."""
    texts = [question.strip() or fallback for question in questions]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return {f"query_{name}": encoded[name] for name in ("input_ids", "attention_mask")}


def question_of(prompt: str, image_token: str = "<image>", role: str = "ASSISTANT") -> str:
    """The question in a prompt, as the official training cuts it out.

    Behind the last image token, from the first line break on, up to the assistant's role word. Where that word is
    missing all of it (the official code then loses the last character). Without an image: "image".
    """
    _, found, text = prompt.rpartition(image_token)
    if not found:
        return FALLBACK
    text = text[text.find("\n") + 1 :]
    return text.partition(role)[0].strip() or FALLBACK


@torch.no_grad()
def question_vectors(model: PreTrainedModel, query_input_ids: Tensor, query_attention_mask: Tensor) -> Tensor:
    """[B, D] states of the model's own language model behind its final norm, without image, cache or dropout.

    At the last real token of every row, or averaged over the real ones where the model was installed with "mean".
    """
    text = model.model.language_model
    training, device = text.training, model.get_input_embeddings().weight.device
    ids, mask = query_input_ids.to(device), query_attention_mask.to(device)
    text.eval()
    try:
        hidden = text(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    finally:
        text.train(training)
    if model.config.quecc["query"] == "mean":
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return last_token(hidden, mask)


def _attach(
    model: PreTrainedModel, tokens: int, layers: tuple[int, ...], heads: int = 8, query: str = "llm_last_token",
    norm_eps: float = 1e-6, dropout: float = 0.0,
) -> QueCCProjector:  # fmt: skip
    adapter = adapter_for(model)
    check_replaceable(model, adapter)
    if not adapter.plain_views or adapter.tiled:
        raise ValueError(f"QueCC takes images of one view; {type(model).__name__} cuts them into tiles.")
    if query not in QUERIES:
        raise ValueError(f"query is one of {', '.join(QUERIES)}, not {query!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a share from 0 to below 1, not {dropout!r}.")
    vision = model.config.vision_config
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] > vision.num_hidden_layers:
        raise ValueError(f"layers are hidden states 0 to {vision.num_hidden_layers} in ascending order, not {layers}.")
    grid = patch_grid(vision)
    projector = QueCCProjector(
        vision.hidden_size, adapter.text_config.hidden_size, layers=len(layers), grid=grid,
        kernel=kernel_of(tokens, grid), heads=heads, query=query, norm_eps=norm_eps, dropout=dropout,
    )  # fmt: skip
    like = next(adapter.whole_projector.parameters(), model.get_input_embeddings().weight)
    model.model.multi_modal_projector = projector.to(like.device, like.dtype).train(model.training)
    model.config.vision_feature_layer = list(layers)
    model.config.image_seq_length = tokens
    model.config.quecc = {
        "tokens": tokens, "layers": list(layers), "heads": heads, "query": query, "norm_eps": norm_eps, "dropout": dropout,
    }  # fmt: skip
    if not getattr(model.model, "_reads_questions", False):
        model.model._reads_questions = True
        model.register_forward_pre_hook(_before_model, with_kwargs=True)
    return projector


def _before_model(model: nn.Module, args: tuple, kwargs: dict):
    """Turn a batch's questions into vectors, one for each image, and take them out of the arguments."""
    if "query_input_ids" not in kwargs:
        return None
    asked = {k: kwargs.pop(k) for k in ("query_input_ids", "query_attention_mask") if k in kwargs}
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    if "query_attention_mask" not in asked or len(asked["query_input_ids"]) != len(ids):
        raise ValueError(
            "A batch brings query_input_ids and query_attention_mask with one question for each of its rows."
        )
    vectors = question_vectors(model, **asked)
    images = (ids == model.config.image_token_id).sum(1) // model.config.quecc["tokens"]
    model.model.multi_modal_projector.ask(vectors.repeat_interleave(images.to(vectors.device), dim=0), once=True)
    return args, kwargs


def _projector_of(model: PreTrainedModel) -> QueCCProjector:
    check_loaded(model)
    projector = getattr(model.model, "multi_modal_projector", None)
    if not isinstance(projector, QueCCProjector):
        raise ValueError(
            f"This model has {type(projector).__name__}, no QueCC projector: load a trained one with "
            "vlmcompress.quecc.from_pretrained, or put one in with vlmcompress.quecc.install and train it."
        )
    return projector
