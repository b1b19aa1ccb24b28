# SPDX-License-Identifier: Apache-2.0
"""Two CPU workers hold one model (tensor parallel), or a copy each (data parallel): answers stay those of transformers."""

from __future__ import annotations

import concurrent.futures

import httpx
import pytest
from serving.engine.asking import questions
from serving.engine.conftest import TINY
from serving.engine.test_server import ENTRY, FLAGS, ask, body, expected, image_part, text_of, url_of
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmcompress.commands.bench_serve import served
from vlmcompress.serving.load import samples


@pytest.fixture
def processes(monkeypatch):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.parametrize("kind", ["tensor", "data"])
def test_two_workers(kind, processes, wide, tmp_path):
    processor, model = AutoProcessor.from_pretrained(TINY), AutoModelForImageTextToText.from_pretrained(TINY).eval()
    requests = questions(processor, 20)
    bodies = [body(text_of(r), image_part(url_of(r.images[0]))) for r in requests]
    with served(str(wide), ENTRY, [*FLAGS, f"--{kind}-parallel-size", "2"], tmp_path / "log") as address:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda request: ask(address, request), bodies))
        metrics = httpx.get(f"{address}/metrics").text
    texts = [answer.json()["choices"][0]["message"]["content"].strip() for answer in found]
    assert texts == [text.strip() for text in expected(model, processor, requests)]
    engines = list(samples(metrics, "vllm:prompt_tokens_total"))
    assert len(engines) == (2 if kind == "data" else 1)
    assert all(engines)  # both copies had work
