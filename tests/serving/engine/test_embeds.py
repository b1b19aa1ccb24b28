# SPDX-License-Identifier: Apache-2.0
"""Ready-made embeddings: an engine without a vision tower answers what the compressed model of transformers answers."""

from __future__ import annotations

import pytest
import torch
from serving.engine.asking import Request, answers, by_engine, by_transformers, questions
from serving.engine.conftest import TINY
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.model_executor.models.utils import StageMissingLayer

import vlmcompress
from vlmcompress.serving.encode import Encoder


@pytest.fixture(scope="module")
def llm(start, wide):
    return start(wide, None, enable_mm_embeds=True, limit_mm_per_prompt={"image": 0})


@pytest.fixture(scope="module")
def requests():
    return questions(AutoProcessor.from_pretrained(TINY), 20)


def with_rows(request: Request, rows: torch.Tensor) -> Request:
    return Request(request.text, rows)


def test_the_engine_has_no_tower(llm):
    assert llm.apply_model(lambda module: isinstance(module.vision_tower, StageMissingLayer)) == [True]


@pytest.mark.parametrize(
    ("method", "options"), [("vtc-cls", {"keep": 16}), ("pool", {"keep": 0.25}), ("tome", {"keep": 20})]
)
def test_any_method_and_budget_without_a_restart(llm, requests, method, options):
    encoder = Encoder.from_pretrained(str(TINY), method, **options)
    tokens = encoder([request.images[0] for request in requests])
    outputs = by_engine(llm, [with_rows(r, rows[None]) for r, rows in zip(requests, tokens, strict=True)])
    assert [output.prompt_token_ids.count(4) for output in outputs] == [len(rows) for rows in tokens]
    model, processor = AutoModelForImageTextToText.from_pretrained(TINY).eval(), AutoProcessor.from_pretrained(TINY)
    with vlmcompress.compress(model, method, positions="contiguous", **options):
        assert answers(outputs) == by_transformers(model, processor, requests)


def test_embeddings_of_the_wrong_width_harm_nobody(llm, requests):
    with pytest.raises(ValueError, match="hidden"):
        by_engine(llm, [with_rows(requests[0], torch.zeros(1, 5, 159))])
    encoder = Encoder.from_pretrained(str(TINY), "vtc-cls", keep=16)
    (rows,) = encoder(requests[0].images)
    assert by_engine(llm, [with_rows(requests[0], rows[None])])[0].outputs[0].token_ids
