# SPDX-License-Identifier: Apache-2.0
"""Conversations about pictures as training batches: any processor with a chat template, loss on the answers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .data import KIND_WEIGHTS
from .prior import CachedWeights
from .questions import ask
from .scenes import SceneConfig, make_scene

IGNORED = -100


def conversation(turns: list[tuple[str, str]], images: int = 1) -> list[dict[str, Any]]:
    """Messages of (question, answer) pairs; the pictures stand in the first question."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = [{"type": "image"}] * (images if number == 0 else 0)
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


class SceneChats(Dataset):
    """Scenes with ``questions`` pairs each, in random order; item i depends on the seed and on i alone.

    With ``pairs``, pictures and their pairs as `hires.easy_vqa_pairs` gives them, every fourth item is one of those.
    """

    def __init__(
        self, seed: int, length: int, config: SceneConfig | None = None, questions: int = 8, pairs: list | None = None
    ):
        self.seed, self.length, self.questions, self.pairs = seed, length, questions, pairs
        self.config = SceneConfig() if config is None else config

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, i, 1))
        if self.pairs and i % 4 == 3:
            image, asked = self.pairs[int(rng.integers(len(self.pairs)))]
        else:
            scene = make_scene(self.seed, i, self.config)
            image, asked = scene.image, ask(scene, rng, self.questions, KIND_WEIGHTS)
        turns = [(asked[j].question, asked[j].answer) for j in rng.permutation(len(asked))[: self.questions]]
        return {"images": [image], "messages": conversation(turns), "index": i}


class JsonChats(Dataset):
    """A file in LLaVA's format: a list of ``{"image": path, "conversations": [{"from": "human" | "gpt", "value"}]}``.

    Raises ``ValueError`` in one sentence for a file that is missing or of another form.
    """

    def __init__(self, path: Path, images: Path):
        if not path.is_file():
            raise ValueError(f"There is no data file '{path}'.")
        self.images = images
        self.rows = [row for row in json.loads(path.read_text()) if "image" in row]
        if not self.rows or any("conversations" not in row for row in self.rows):
            raise ValueError(f"'{path}' is no list of entries with an 'image' and 'conversations'.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        said = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
        with Image.open(self.images / row["image"]) as image:
            picture = image.convert("RGB")
        turns = list(zip(said[::2], said[1::2], strict=False))
        return {"images": [picture], "messages": conversation(turns), "index": i}


class ChatCollator:
    """Items ``{"images", "messages", "index"}`` → a batch with labels on the assistant's words and the end behind them.

    Every picture has **one** placeholder (``tokens=None``), which the model expands while it trains
    (:class:`~.counts.FlexCallback`), or ``tokens`` of them, for evaluation and for projectors of one count. ``weights``
    adds ``token_weights`` for the PRIOR loss.
    """

    def __init__(self, processor: Any, tokens: int | None = None, weights: CachedWeights | None = None):
        self.processor, self.tokens, self.weights = processor, tokens, weights

    def encode(self, messages: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Token ids and labels [S] of one conversation, one placeholder per picture."""
        tokenizer, template = self.processor.tokenizer, self.processor.apply_chat_template
        text = template(messages, tokenize=False)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(template(messages[:i], tokenize=False, add_generation_prompt=True))
                spans.append((start, len(template(messages[: i + 1], tokenize=False))))
        begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        made = tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=True)
        ids, labels = list(made["input_ids"]), []
        for token, (first, last) in zip(ids, made["offset_mapping"], strict=True):
            answered = last > first and any(last > start and last <= end for start, end in spans)
            labels.append(token if answered else IGNORED)
        end = tokenizer.eos_token_id
        if end is not None and labels and labels[-1] != end:
            ids, labels = [*ids, end], [*labels, end]
        return torch.tensor(ids), torch.tensor(labels)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [self.encode(item["messages"]) for item in items]
        columns = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
        columns["attention_mask"] = [torch.ones_like(ids) for ids in columns["input_ids"]]
        if self.weights is not None:
            columns["token_weights"] = [self.weights[item["index"]] for item in items]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id or 0, "labels": IGNORED}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fill.get(name, 0))
            for name, column in columns.items()
        }
        pictures = [image for item in items for image in item["images"]]
        batch["pixel_values"] = self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        if self.tokens is not None:
            from .counts import expand

            batch = expand(batch, self.processor.image_token_id, self.tokens, fill["input_ids"])
        return batch
