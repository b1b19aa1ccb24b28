# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 in a real engine: what the plug-in serves is what the compressed model of transformers answers."""

from __future__ import annotations

import gc

import pytest
import torch
from PIL import Image
from serving.engine.asking import answers, by_engine, by_transformers, chat, questions
from serving.engine.conftest import TINY
from serving.engine.widened import widen

import vlmcompress
from vlmcompress.method import create
from vlmcompress.serving.tokens import VisualEncoder

KEEP = 16
ENTRY = {"method": "vtc-cls", "keep": KEEP}
PLACEHOLDER = 4


@pytest.fixture(scope="module")
def compressed(start, wide):
    return start(wide, ENTRY)


def expected(model, processor, requests, method: str, **options) -> list[list[int]]:
    with vlmcompress.compress(model, method, positions="contiguous", **options):
        return by_transformers(model, processor, requests)


def placeholders(output) -> int:
    return output.prompt_token_ids.count(PLACEHOLDER)


def test_answers_of_sixty_questions(compressed, model, processor):
    requests = questions(processor, 60)
    outputs = by_engine(compressed, requests)
    assert {placeholders(output) for output in outputs} == {KEEP}
    assert answers(outputs) == expected(model, processor, requests, **ENTRY)
    # the uncompressed model answers otherwise at times, so equality says something
    assert answers(outputs) != by_transformers(model, processor, requests)


def test_features_are_those_of_transformers(compressed, model, processor):
    images = [request.images[0] for request in questions(processor, 15)[::5]]
    pixels = torch.cat([processor(text="<image>", images=[i], return_tensors="pt")["pixel_values"] for i in images])
    served = compressed.apply_model(lambda module: [x.clone() for x in module.embed_multimodal(pixel_values=pixels)])[0]
    reference = VisualEncoder(model, create(**ENTRY))({"pixel_values": pixels})
    for ours, theirs in zip(served, reference, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_sizes_of_images(compressed, model, processor):
    scene = questions(processor, 1)[0].images[0]
    sizes = [(96, 96), (300, 40), (40, 300), (31, 97), (640, 480), (2, 2)]
    requests = [chat(processor, "is there a ring", [scene.resize(size)]) for size in sizes]
    outputs = by_engine(compressed, requests)
    assert [placeholders(output) for output in outputs] == [KEEP] * len(sizes)
    assert answers(outputs) == expected(model, processor, requests, **ENTRY)


def test_several_images_and_text_in_one_batch(compressed, model, processor):
    a, b, c = (request.images[0] for request in questions(processor, 15)[::5])
    requests = [
        chat(processor, "how many are red", [a, b]),
        chat(processor, "is there a ring", []),
        chat(processor, "what shape is blue", [c, a, b]),
        chat(processor, "what color is the star", [b]),
        chat(processor, "is there a ring", []),
        chat(processor, "what color is the star", [a, a]),
    ]
    outputs = by_engine(compressed, requests)
    assert [placeholders(output) for output in outputs] == [KEEP * len(request.images) for request in requests]
    assert answers(outputs) == expected(model, processor, requests, **ENTRY)


def test_prefixes_and_encoded_images_are_kept(compressed, model, processor):
    picture = questions(processor, 1)[0].images[0]
    # a long text in front of the question makes whole blocks of prefix
    words = " ".join(["is there a ring"] * 40)
    requests = [chat(processor, f"{words} {end}", [picture]) for end in ("left", "right", "left")]
    first = [by_engine(compressed, [request])[0] for request in requests]
    assert first[0].num_cached_tokens == 0
    assert all(output.num_cached_tokens >= KEEP + 32 for output in first[1:])
    assert answers(first) == expected(model, processor, requests, **ENTRY)


def test_a_damaged_image_harms_no_other_request(compressed, model, processor):
    good = questions(processor, 2)
    bad = chat(processor, "is there a ring", [Image.new("RGB", (0, 5))])
    with pytest.raises(ValueError, match="Failed to apply"):
        by_engine(compressed, [bad])
    assert answers(by_engine(compressed, good)) == expected(model, processor, good, **ENTRY)


def test_small_chunks_of_a_prompt_and_a_second_engine_beside_the_first(compressed, start, wide, model, processor):
    llm = start(wide, {"method": "flowcut", "keep": 20}, max_num_batched_tokens=32, max_num_seqs=2, max_model_len=512)
    requests = [
        *questions(processor, 10),
        chat(processor, "is there a ring", [questions(processor, 1)[0].images[0]] * 2),
    ]
    outputs = by_engine(llm, requests)
    assert placeholders(outputs[0]) == 20
    assert answers(outputs) == expected(model, processor, requests, "flowcut", keep=20)
    assert answers(by_engine(compressed, requests[:5])) == expected(model, processor, requests[:5], **ENTRY)


def test_without_settings_the_engine_is_stock(start, model, processor, tmp_path):
    gc.collect()
    resaved = widen(TINY, tmp_path / "resaved", hub_names=False)  # names that stock vLLM 0.32 does not know
    llm = start(resaved)
    requests = questions(processor, 15)
    outputs = by_engine(llm, requests)
    assert placeholders(outputs[0]) == 144
    assert answers(outputs) == by_transformers(model, processor, requests)


def test_resaved_checkpoints_are_compressed_too(start, model, processor, tmp_path):
    llm = start(widen(TINY, tmp_path / "resaved", hub_names=False), {"method": "pool", "keep": 0.25})
    requests = questions(processor, 10)
    outputs = by_engine(llm, requests)
    assert placeholders(outputs[0]) == 36
    assert answers(outputs) == expected(model, processor, requests, "pool", keep=0.25)
