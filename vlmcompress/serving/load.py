# SPDX-License-Identifier: Apache-2.0
"""A load on an OpenAI-compatible server: clients that ask about a picture of their own, again and again, and the clocks."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

#: of vLLM's metrics, those that tell what the server's memory went through
GAUGES = {"kv_share": "vllm:kv_cache_usage_perc", "running": "vllm:num_requests_running"}
COUNTERS = {"preemptions": "vllm:num_preemptions_total", "prompt_tokens": "vllm:prompt_tokens_total"}


@dataclass
class Answer:
    """Seconds of one request: from its sending to each chunk of its answer. ``error``: what the server said instead."""

    chunks: list[float] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True)
class Load:
    """``clients`` at once, each with ``requests`` one after the other; ``tokens`` new tokens each, ``words`` in a prompt."""

    clients: int
    requests: int
    tokens: int = 8
    words: int = 60
    edge: int = 336
    seed: int = 0


def picture(edge: int, seed: int) -> str:
    """A picture of ``edge`` pixels that no other seed draws, as a ``data:`` address."""
    small = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((edge, edge), Image.Resampling.NEAREST).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body_of(load: Load, model: str, number: int) -> dict[str, Any]:
    """The chat request of one picture; nothing in it was sent before."""
    words = np.random.default_rng(load.seed + number).integers(0, 10_000, load.words)
    content = [
        {"type": "image_url", "image_url": {"url": picture(load.edge, load.seed + number)}},
        {"type": "text", "text": " ".join(map(str, words))},
    ]
    return {
        "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": load.tokens, "temperature": 0,
        "stream": True, "ignore_eos": True,
    }  # fmt: skip


async def ask(session: Any, address: str, body: dict[str, Any]) -> Answer:
    """Send one chat request and time the chunks of its answer."""
    answer, start = Answer(), time.perf_counter()
    async with session.post(f"{address}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            answer.error = f"HTTP {response.status}: {(await response.text())[:300]}"
            return answer
        async for line in response.content:
            text = line.decode().strip()
            if not text.startswith("data: ") or text == "data: [DONE]":
                continue
            choices = json.loads(text[6:]).get("choices")
            if choices and choices[0]["delta"].get("content") is not None:
                answer.chunks.append(time.perf_counter() - start)
    return answer


def samples(metrics: str, name: str) -> Iterator[float]:
    """Values of one metric in Prometheus' text form."""
    for found in re.finditer(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? ([-+.eE\d]+)$", metrics, re.MULTILINE):
        yield float(found[1])


async def metrics_of(session: Any, address: str) -> str:
    """What the server counts, in Prometheus' text form."""
    async with session.get(f"{address}/metrics") as response:
        return await response.text()


async def run(address: str, model: str, load: Load) -> dict[str, Any]:
    """Put ``load`` on a server and measure. Raises ``ValueError`` when a request was answered with an error."""
    import aiohttp

    peaks: dict[str, float] = dict.fromkeys(GAUGES, 0.0)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        before = await metrics_of(session, address)

        async def client(number: int) -> list[Answer]:
            first = number * load.requests
            return [await ask(session, address, body_of(load, model, first + i)) for i in range(load.requests)]

        async def watch() -> None:
            while True:
                text = await metrics_of(session, address)
                for key, name in GAUGES.items():
                    peaks[key] = max(peaks[key], *samples(text, name), 0.0)
                await asyncio.sleep(0.25)

        watcher = asyncio.create_task(watch())
        start = time.perf_counter()
        answers = list(chain(*await asyncio.gather(*map(client, range(load.clients)))))
        seconds = time.perf_counter() - start
        watcher.cancel()
        after = await metrics_of(session, address)
    errors = [answer.error for answer in answers if answer.error or not answer.chunks]
    if errors:
        raise ValueError(f"{len(errors)} of {len(answers)} requests failed: {errors[0] or 'no token came'}")
    counted = {key: sum(samples(after, name)) - sum(samples(before, name)) for key, name in COUNTERS.items()}
    blocks = [int(n) for n in re.findall(r'vllm:cache_config_info\{[^}]*num_gpu_blocks="(\d+)"', after)]
    return {**summary(answers, seconds), **counted, **blocks_used(peaks, sum(blocks))}


def summary(answers: list[Answer], seconds: float) -> dict[str, Any]:
    """Rates, and percentiles in milliseconds."""
    first = np.array([answer.chunks[0] for answer in answers]) * 1000
    gaps = np.concatenate([np.diff(answer.chunks) for answer in answers]) * 1000
    return {
        "requests": len(answers),
        "seconds": seconds,
        "requests_per_second": len(answers) / seconds,
        "first_token_ms": {"p50": float(np.percentile(first, 50)), "p99": float(np.percentile(first, 99))},
        "between_tokens_ms": {"p50": float(np.percentile(gaps, 50)), "p99": float(np.percentile(gaps, 99))}
        if len(gaps)
        else None,
    }


def blocks_used(peaks: dict[str, float], blocks: int) -> dict[str, Any]:
    """The fullest that the KV cache was seen, looked at four times a second."""
    return {
        "kv_blocks": blocks,
        "kv_blocks_used_peak": round(peaks["kv_share"] * blocks),
        "running_peak": round(peaks["running"]),
    }
