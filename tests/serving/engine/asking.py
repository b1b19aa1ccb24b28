# SPDX-License-Identifier: Apache-2.0
"""Questions, and their greedy answers by an engine and by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from vlmcompress.training.questions import ask
from vlmcompress.training.scenes import make_scene

NEW_TOKENS = 4


@dataclass
class Request:
    """A prompt in the chat template's text, and its images."""

    text: str
    images: list[Image.Image]


def chat(processor, question: str, images: Sequence[Image.Image]) -> Request:
    """``question`` behind ``images``."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return Request(text, list(images))


def questions(processor, count: int, seed: int = 11) -> list[Request]:
    """``count`` questions about drawn scenes, five on each."""
    found = []
    for index in range(-(-count // 5)):
        scene = make_scene(seed, index)
        for qa in ask(scene, np.random.default_rng(index), 5):
            found.append(chat(processor, qa.question, [scene.image]))
    return found[:count]


def by_engine(llm, requests: Sequence[Request], **options):
    """One output of vLLM for each request, all in one batch."""
    from vllm import SamplingParams

    prompts = [
        {"prompt": r.text, **({"multi_modal_data": {"image": r.images}} if len(r.images) else {})} for r in requests
    ]
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, **options), use_tqdm=False)


def answers(outputs) -> list[list[int]]:
    """New tokens of every output."""
    return [list(output.outputs[0].token_ids) for output in outputs]


@torch.no_grad()
def by_transformers(model, processor, requests: Sequence[Request]) -> list[list[int]]:
    """Greedy new tokens, one request at a time, end-of-sequence token included as vLLM does."""
    found = []
    for request in requests:
        inputs = processor(text=request.text, images=request.images or None, return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return found
