# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with the plug-in over HTTP: answers, bad requests, clients that leave, settings that stop it from starting."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import socket
import subprocess

import httpx
import pytest
import torch
from PIL import Image
from serving.engine.asking import NEW_TOKENS, by_transformers, questions
from serving.engine.conftest import TINY

import vlmcompress
from vlmcompress.commands.bench_serve import command_of, reason_in, served
from vlmcompress.serving.encode import Encoder, content_part, packed
from vlmcompress.serving.load import samples

FLAGS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
ENTRY = {"method": "vtc-cls", "keep": 16}


@pytest.fixture(scope="module")
def address(wide, tmp_path_factory, monkeypatch_module):
    with served(str(wide), ENTRY, FLAGS, tmp_path_factory.mktemp("logs") / "log") as found:
        yield found


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_PLUGINS", "vlmcompress")
        yield patch


def url_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(question: str, part: dict, **options) -> dict:
    content = [part, {"type": "text", "text": question}]
    return {
        "model": "served", "messages": [{"role": "user", "content": content}], "max_tokens": NEW_TOKENS, "temperature": 0,
        "add_special_tokens": True,  # the template leaves the start of a text to the tokenizer
        **options,
    }  # fmt: skip


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def ask(address: str, request: dict) -> httpx.Response:
    return httpx.post(f"{address}/v1/chat/completions", json=request, timeout=600)


def text_of(request) -> str:
    return request.text.replace("<image>", "").strip()


def expected(model, processor, requests) -> list[str]:
    with vlmcompress.compress(model, positions="contiguous", **ENTRY):
        return processor.batch_decode(by_transformers(model, processor, requests), skip_special_tokens=True)


def test_many_clients_get_the_compressed_models_answers(address, model, processor):
    requests = questions(processor, 25)
    bodies = [body(text_of(r), image_part(url_of(r.images[0]))) for r in requests]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda request: ask(address, request), bodies))
    assert {answer.status_code for answer in found} == {200}
    texts = [answer.json()["choices"][0]["message"]["content"].strip() for answer in found]
    assert texts == [text.strip() for text in expected(model, processor, requests)]
    prompts = [len(processor.tokenizer(request.text)["input_ids"]) for request in requests]
    assert [answer.json()["usage"]["prompt_tokens"] for answer in found] == [n - 1 + 16 for n in prompts]


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(b"no picture").decode(),
        url_of(Image.new("RGB", (40, 40)))[:60],
        "data:image/png;base64,***",
        "ftp://nowhere/picture.png",
    ],
)
def test_damaged_images_are_4xx_with_a_sentence(address, url):
    answer = ask(address, body("is there a ring", image_part(url)))
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]
    assert httpx.get(f"{address}/health").status_code == 200


def test_a_picture_of_too_many_pixels_is_refused(address, model, processor):
    huge = image_part(url_of(Image.new("1", (14_000, 13_000))))
    request = questions(processor, 1)[0]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        other = pool.submit(ask, address, body(text_of(request), image_part(url_of(request.images[0]))))
        answer = ask(address, body("is there a ring", huge))
    assert answer.status_code == 400 and "too many pixels" in answer.json()["error"]["message"]
    assert (
        other.result().json()["choices"][0]["message"]["content"].strip()
        == expected(model, processor, [request])[0].strip()
    )


def test_ready_embeddings_are_refused_where_pixels_are_served(address):
    answer = ask(address, body("is there a ring", content_part(torch.zeros(16, 160))))
    assert answer.status_code == 400 and "--enable-mm-embeds" in answer.json()["error"]["message"]


def test_a_client_that_leaves_takes_nobody_along(address, model, processor):
    requests = questions(processor, 8)
    leaving = body(
        "is there a ring", image_part(url_of(requests[0].images[0])), stream=True, max_tokens=400, ignore_eos=True
    )
    bodies = [body(text_of(r), image_part(url_of(r.images[0]))) for r in requests]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, address, request) for request in bodies]
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=leaving, timeout=600) as stream:
            next(stream.iter_lines())
        found = [future.result() for future in asked]
    texts = [answer.json()["choices"][0]["message"]["content"].strip() for answer in found]
    assert texts == [text.strip() for text in expected(model, processor, requests)]
    metrics = httpx.get(f"{address}/metrics").text
    assert sum(samples(metrics, "vllm:num_requests_running")) == 0


@pytest.mark.parametrize(
    ("entry", "words"),
    [({"method": "fastv"}, "'vtc-cls'"), ({"method": "vtc-cls", "keep": -3}, "keep is a number of visual tokens")],
)
def test_bad_settings_stop_the_start_with_a_sentence(wide, monkeypatch_module, entry, words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(command_of(str(wide), port, entry, FLAGS), capture_output=True, text=True, timeout=1500)
    assert done.returncode != 0
    assert words in reason_in(done.stdout + done.stderr)


#: no rows, too many for the prompt, two images for one place, a single row without its axis
MISSHAPEN = [(0, 160), (1100, 160), (2, 5, 160), (160,)]


def test_a_server_without_a_tower_takes_embeddings(wide, monkeypatch_module, tmp_path, model, processor):
    flags = [*FLAGS, "--enable-mm-embeds", "--limit-mm-per-prompt", json.dumps({"image": 0})]
    requests = questions(processor, 10)
    encoder = Encoder.from_pretrained(str(TINY), **ENTRY)
    tokens = encoder([request.images[0] for request in requests])
    with served(str(wide), None, flags, tmp_path / "log") as address:
        found = [ask(address, body(text_of(r), content_part(rows))) for r, rows in zip(requests, tokens, strict=True)]
        narrow = ask(address, body("is there a ring", content_part(tokens[0][:, :-1])))
        wrong = [ask(address, body("is there a ring", content_part(torch.zeros(*shape)))) for shape in MISSHAPEN]
        for text in ("bm90aGluZw==", "", packed(tokens[0])[:4000]):
            wrong.append(ask(address, body("is there a ring", {"type": "image_embeds", "image_embeds": text})))
        again = ask(address, body(text_of(requests[0]), content_part(tokens[0])))
    texts = [answer.json()["choices"][0]["message"]["content"].strip() for answer in found]
    assert texts == [text.strip() for text in expected(model, processor, requests)]
    assert 400 <= narrow.status_code < 500 and narrow.json()["error"]["message"]
    assert {answer.status_code for answer in wrong} == {400}
    assert all(answer.json()["error"]["message"] for answer in wrong)
    assert again.json()["choices"][0]["message"]["content"].strip() == texts[0]
