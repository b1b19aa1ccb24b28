# SPDX-License-Identifier: Apache-2.0
"""Scores for QuoTA: how well each frame of a video serves a question, asked of a vision-language model (2503.08689).

Here for any model, beforehand; :mod:`vlmcompress.quota_model` asks the model that is being compressed, during the call. The
prompts are ours; the released wording can be passed in where scores have to be reproduced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

DECOUPLE = """Prepare a question about a video for an object detector. Answer in three numbered steps.
Step 1: must concrete physical things be detected to answer it? Yes or no.
Step 2: if yes, list them as a JSON list of strings.
Step 3: the same list, physical things only, or null.

Question: How many people enter the kitchen?
Step 1: yes
Step 2: ["person", "kitchen"]
Step 3: ["person", "kitchen"]

Question: Why is the old man angry at the waiter?
Step 1: yes
Step 2: ["old man", "anger", "waiter"]
Step 3: ["old man", "waiter"]

Question: What is the mood of this video?
Step 1: no
Step 2: null
Step 3: null

Question: {question}
"""
LETTERS = "\nA. Yes.\nB. No.\nAnswer with the letter only."
ANY_OF = "Does the picture show any of the following: {objects}?" + LETTERS
ENOUGH = "{question}\nDoes the picture hold enough information to answer this?" + LETTERS


def parse_objects(reply: str) -> list[str] | None:
    """The objects listed in the third step of a reply to :data:`DECOUPLE`; None where there are none.

    Nothing of the reply is executed: the list is read as JSON, or, where quotes are single or missing, split at commas.
    """
    reply = reply.lower()
    verdict = re.search(r"step 1:\s*(\w+)", reply)
    last = re.search(r"step 3:\s*\[([^\]]*)\]", reply)
    if last is None or (verdict is not None and verdict[1] == "no"):
        return None
    try:
        items = json.loads(f"[{last[1]}]")
    except json.JSONDecodeError:
        items = last[1].split(",")
    cleaned = [item.strip().strip("'\"").strip() for item in items if isinstance(item, str)]
    return list(dict.fromkeys(item for item in cleaned if item)) or None


def scoring_question(question: str, objects: Sequence[str] | None, any_of: str = ANY_OF, enough: str = ENOUGH) -> str:
    """What a frame is asked: ``any_of`` with the ``objects``, or ``enough`` with the ``question`` where there are none."""
    if objects:
        return any_of.replace("{objects}", ", ".join(objects))
    return enough.replace("{question}", without_options(question))


def decoupled(ask: Callable[[str], str], question: str, *, prompt: str = DECOUPLE) -> list[str] | None:
    """The objects that ``question`` asks for, as ``ask`` (prompt → reply) lists them; None to fall back to the question."""
    return parse_objects(ask(prompt.replace("{question}", without_options(question))))


def without_options(question: str) -> str:
    """``question`` without lines such as "A. two" or "(B) three": they would bias the letter that is asked for."""
    lines = question.splitlines()
    return "\n".join(line for line in lines if not re.match(r"\s*\(?[A-H][.):]\s", line)).strip() or question


def letter_id(tokenizer: Any, letter: str = "A") -> int:
    """Token of a lone letter (or word). Raises ``ValueError`` where the tokenizer has no single token for it."""
    ids = tokenizer.encode(letter, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"The tokenizer has no single token for the answer {letter!r}, whose probability is the score."
        )
    return ids[0]


class FrameScorer:
    """Probability that a vision-language model says yes, frame by frame.

    Args:
        model: the helper: the model that will answer (before it is compressed), or a smaller one.
        processor: its processor, with tokenizer and image processor.
        batch: frames per forward pass.
        template: text of the user's turn → prompt with one image; default the processor's chat template.
        any_of, enough: the scoring questions, with and without a list of objects.
        letter: the answer that means yes; one token.

    Scores of a (frame, question) pair that comes again, as in clips shorter than the sampler wants, are computed once.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        batch: int = 64,
        template: Callable[[str], str] | None = None,
        any_of: str = ANY_OF,
        enough: str = ENOUGH,
        letter: str = "A",
    ):
        self.model, self.processor, self.batch = model, processor, batch
        self.template, self.any_of, self.enough = template or self._chat, any_of, enough
        self.letter = letter_id(processor.tokenizer, letter)

    def _chat(self, text: str) -> str:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        return self.processor.apply_chat_template([turn], add_generation_prompt=True)

    @torch.no_grad()
    def __call__(self, frames: Sequence[Any], question: str, objects: Sequence[str] | None = None) -> list[float]:
        """Scores in (0, 1) of ``frames`` (images that the processor takes), in order.

        ``objects``: what :func:`decoupled` found; without it the question itself is put. The softmax runs in fp32 over
        the whole vocabulary at the last place of the left-padded prompt.
        """
        prompt = self.template(scoring_question(question, objects, self.any_of, self.enough))
        first: dict[Any, int] = {}
        number = [first.setdefault(_content(frame), len(first)) for frame in frames]
        distinct = [frames[number.index(i)] for i in range(len(first))]
        found: list[float] = []
        for start in range(0, len(distinct), self.batch):
            part = list(distinct[start : start + self.batch])
            inputs = self.processor(
                images=part, text=[prompt] * len(part), padding=True, padding_side="left", return_tensors="pt"
            )
            logits = self.model(**inputs.to(self.model.device), logits_to_keep=1).logits[:, -1]
            found += logits.float().softmax(-1)[:, self.letter].tolist()
        return [found[i] for i in number]


def _content(frame: Any) -> Any:
    """What makes two frames the same: mode, size and bytes of a picture, or of an array."""
    if hasattr(frame, "tobytes"):
        return getattr(frame, "mode", None), getattr(frame, "size", None), frame.tobytes()
    return id(frame)
