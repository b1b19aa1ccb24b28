# SPDX-License-Identifier: Apache-2.0
"""Scores for QuoTA from the model that is being compressed itself, made during the call (arXiv 2503.08689)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .dtypes import LongTensor
from .eval.flops import ModelShape, Profile, UnknownFlopsError, decode_step, full
from .eval.loading import prompt_of, turn
from .eval.profiles import stock
from .quota import ANY_OF, DECOUPLE, ENOUGH, letter_id, parse_objects, scoring_question, without_options

if TYPE_CHECKING:
    from .adapters.base import Adapter

#: stands for the question where a chat template is looked at
_HERE = "@@@"


class ModelScorer:
    """The model that is being compressed tells, during a call, how well each frame of its videos serves the question.

    It is asked with everything of this library off. A frame, or a group of frames that the family merges, is shown as a
    video of its own in the pixels that the call brought; the question is what the prompt says behind its last picture
    (before it, where nothing follows), without what the chat template puts around.

    Args:
        adapter: of the model.
        processor: its processor: chat template and tokenizer.
        batch: frames per forward pass.
        any_of, enough, letter: see :class:`vlmcompress.quota.FrameScorer`.
        decouple: True lets the model list the objects first (:data:`vlmcompress.quota.DECOUPLE`); a regular expression
            takes its groups in the question for them; False puts the question itself.
        reply_tokens: most new tokens of such a list.

    Raises ``ValueError`` where the tokenizer has no single token for ``letter``.
    """

    def __init__(
        self,
        adapter: Adapter,
        processor: Any,
        *,
        batch: int = 64,
        any_of: str = ANY_OF,
        enough: str = ENOUGH,
        letter: str = "A",
        decouple: bool | str = False,
        reply_tokens: int = 128,
    ):
        self.adapter, self.processor, self.batch = adapter, processor, batch
        self.any_of, self.enough, self.decouple, self.reply_tokens = any_of, enough, decouple, reply_tokens
        self.letter = letter_id(processor.tokenizer, letter)
        self.shape = _shape_of(adapter.model)
        around = prompt_of(processor, turn(_HERE, [])).partition(_HERE)
        self.head, self.tail = (self._read(self._ids(text)) for text in (around[0], around[2]))

    @torch.no_grad()
    def __call__(self, given: dict[str, Any], ids: LongTensor) -> tuple[list[list[float]], float]:
        """Scores in (0, 1) of every view of every video in a call of the video door, and the FLOPs that they took.

        ``given``: the call's arguments by name; ``ids`` [B, S]: the prompts. Frames of one content under one question are
        asked about once.
        """
        layout = self.adapter.video_geometry(given)
        placed = layout.placed(self.adapter.placeholders({"input_ids": ids}, "video"))
        rows = dict(zip(placed.source, placed.sample, strict=True))  # copies of a prompt (beams) ask the same
        questions = {row: self.question_of(ids[row]) for row in set(rows.values())}
        objects, flops = self._objects(list(dict.fromkeys(questions.values())))
        frames, asked = self.adapter.single_frames(given), []
        for video in layout.view_image.tolist():
            question = questions[rows[video]]
            asked.append(scoring_question(question, objects.get(question), self.any_of, self.enough))
        first: dict[Any, int] = {}
        number = [
            first.setdefault((_digest(frame), text), i)
            for i, (frame, text) in enumerate(zip(frames, asked, strict=True))
        ]
        distinct, found = list(first.values()), {}
        for start in range(0, len(distinct), self.batch):
            part = distinct[start : start + self.batch]
            scores, cost = self._scores([frames[i] for i in part], [asked[i] for i in part], ids.device)
            found.update(zip(part, scores, strict=True))
            flops += cost
        videos: list[list[float]] = [[] for _ in range(len(layout))]
        for video, i in zip(layout.view_image.tolist(), number, strict=True):
            videos[video].append(found[i])
        return videos, flops

    def _scores(
        self, frames: list[dict[str, Tensor]], asked: list[str], device: torch.device
    ) -> tuple[list[float], float]:
        """Probability of :attr:`letter` behind one prompt per frame, in fp32 over the whole vocabulary, and the FLOPs."""
        shown = {name: torch.cat([frame[name] for frame in frames]) for name in frames[0]}
        layout = self.adapter.video_geometry(shown)
        prompts = {text: self._ids(prompt_of(self.processor, turn(text, []))) for text in set(asked)}
        inputs = self._padded([self._filled(prompts[t], n) for t, n in zip(asked, layout.n, strict=True)], device)
        model, ids = self.adapter.model, inputs["input_ids"]
        logits = model(
            **inputs, **shown, **self.adapter.prompt_arguments(ids), use_cache=False, logits_to_keep=1
        ).logits[:, -1]
        scores = logits.float().softmax(-1)[:, self.letter].tolist()
        if self.shape is None:
            return scores, 0.0
        placed = layout.placed(self.adapter.placeholders(inputs, "video"))
        text = [len(prompts[t]) - 1 for t in asked]
        return scores, sum(full(self.shape, profile) for profile in stock(self.shape, placed, text))

    def question_of(self, ids: LongTensor) -> str:
        """The question in the prompt ``ids`` [S]."""
        given = {"input_ids": ids[None]}
        seen = torch.stack([self.adapter.placeholders(given, kind)[0] for kind in self.adapter.doors]).any(0)
        places = seen.nonzero()[:, 0].tolist()
        behind = self._read(ids[places[-1] + 1 :].tolist()).removesuffix(self.tail).strip()
        return behind or self._read(ids[: places[0]].tolist()).removeprefix(self.head).strip()

    def _objects(self, questions: list[str]) -> tuple[dict[str, list[str] | None], float]:
        """What each of ``questions`` is about, and the FLOPs of finding out."""
        if isinstance(self.decouple, str):
            matches = {question: re.search(self.decouple, question) for question in questions}
            return {q: [g for g in m.groups() if g] if m else None for q, m in matches.items()}, 0.0
        if not self.decouple:
            return {}, 0.0
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": DECOUPLE.replace("{question}", without_options(q))}],
                }
            ]
            for q in questions
        ]
        prompts = [self._ids(prompt_of(self.processor, chat)) for chat in chats]
        inputs = self._padded(prompts, self.adapter.model.device)
        out = self.adapter.model.generate(
            **inputs, **self.adapter.prompt_arguments(inputs["input_ids"]), do_sample=False, num_beams=1,
            max_new_tokens=self.reply_tokens,
        )  # fmt: skip
        replies = out[:, inputs["input_ids"].shape[1] :].tolist()
        flops = sum(self._text_cost(len(prompt), len(reply)) for prompt, reply in zip(prompts, replies, strict=True))
        return {q: parse_objects(self._read(reply)) for q, reply in zip(questions, replies, strict=True)}, flops

    def _text_cost(self, prompt: int, reply: int) -> float:
        """FLOPs of a prompt without pictures and of decoding a reply of so many tokens."""
        if self.shape is None:
            return 0.0
        layers = self.shape.text.layers
        steps = (decode_step(self.shape, (prompt + i,) * layers) for i in range(reply - 1))
        return full(self.shape, Profile(visual=(0,) * layers, text=prompt)) + sum(steps)

    def _filled(self, ids: list[int], tokens: int) -> list[int]:
        """``ids`` with ``tokens`` placeholders in the place of their one."""
        token = self.adapter.model.config.video_token_id
        if ids.count(token) != 1:
            raise ValueError("The processor's chat template does not show a video as one placeholder token.")
        place = ids.index(token)
        return ids[:place] + [token] * tokens + ids[place + 1 :]

    def _padded(self, prompts: list[list[int]], device: torch.device) -> dict[str, LongTensor]:
        """``input_ids`` and ``attention_mask`` of left-padded prompts."""
        padding = {"input_ids": self.processor.tokenizer.pad_token_id or 0, "attention_mask": 0}
        rows = {"input_ids": prompts, "attention_mask": [[1] * len(prompt) for prompt in prompts]}
        width = max(map(len, prompts))
        return {
            name: torch.tensor([[fill] * (width - len(row)) + row for row in rows[name]], device=device)
            for name, fill in padding.items()
        }

    def _ids(self, text: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        bos = tokenizer.bos_token  # the template may have written it already
        return tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))

    def _read(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def processor_of(model: PreTrainedModel) -> Any:
    """The processor beside the weights of ``model``; None where there is none that reads text and pictures."""
    name = model.config._name_or_path
    if not name:
        return None
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name)
    except (ImportError, OSError, ValueError):
        return None
    return processor if hasattr(processor, "tokenizer") else None


def _shape_of(model: PreTrainedModel) -> ModelShape | None:
    """What FLOPs follow from; None where they are not known, which the report then says."""
    try:
        return ModelShape.from_config(model.config)
    except UnknownFlopsError:
        return None


def _digest(frame: dict[str, Tensor]) -> str:
    """What makes two frames the same: shapes and bytes of what the model is shown."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name in sorted(frame):
        tensor = frame[name].detach().cpu().contiguous()
        digest.update(repr(tensor.shape).encode() + tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
