# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress serve``: a real server on loopback around the shipped model, spoken to as clients do."""

import base64
import contextlib
import io
import re
import socket
import sys
import threading
import time

import httpx
import openai
import pytest
from PIL import Image, ImageFile

from vlmcompress.attach import compress, current_handle
from vlmcompress.cli import main
from vlmcompress.demo.models import DEFAULT, SAMPLES
from vlmcompress.eval.loading import answer, encode, load
from vlmcompress.serving import hf, hf_request

QUESTION, NAME = "what color is the ring", "tiny-llava"


def address(content: bytes, kind="png"):
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


SCENE = address((SAMPLES / "scene-1.png").read_bytes())


def chat(picture=SCENE, question=QUESTION, **fields):
    shown = [] if picture is None else [{"type": "image_url", "image_url": {"url": picture}}]
    content = [*shown, {"type": "text", "text": question}]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


@contextlib.contextmanager
def running(model, processor, method, **options):
    """A server on a free port; yields its address."""
    limit = options.pop("max_waiting", 64)
    with compress(model, method, **options) as handle, hf.listen("127.0.0.1", 0) as listening:
        server = hf.server(hf.create_app(NAME, handle, processor, max_waiting=limit))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def url():
    with running(*load(str(DEFAULT)), "fastv", keep=36) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0)


def post(url, body, **more):
    return httpx.post(f"{url}/v1/chat/completions", **({"content": body} if isinstance(body, bytes) else {"json": body}),
                      timeout=120, **more)  # fmt: skip


def numbers(url):
    """Every number of ``/metrics`` by its name and labels."""
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r"^(vlmcompress_[^ ]+) ([^ ]+)$", text, re.M)
    return {name: float(value) for name, value in found if "_created" not in name}


def grown(url, before):
    return {name: value - before.get(name, 0) for name, value in numbers(url).items() if value != before.get(name, 0)}


def expect(url, before, name, value=1):
    """Wait until a counter has grown: it is written when the answer has left."""
    for _ in range(200):
        if grown(url, before).get(name) == value:
            return
        time.sleep(0.05)
    pytest.fail(f"{name} has not grown by {value}: {grown(url, before)}")


def test_answers_and_metrics_are_those_of_the_library(url, client):
    before = numbers(url)
    found = client.chat.completions.create(**chat())
    assert found.choices[0].message.content.strip() == "yellow" and found.choices[0].finish_reason == "stop"
    assert found.model == NAME and found.usage.completion_tokens == 2 and found.usage.prompt_tokens > 144
    expect(url, before, 'vlmcompress_requests_total{outcome="answered"}')
    change = grown(url, before)
    model, processor = load(str(DEFAULT))
    with compress(model, "fastv", keep=36) as handle:
        inputs = encode(model, processor, [Image.open(SAMPLES / "scene-1.png").convert("RGB")], [QUESTION])
        assert answer(model, processor, inputs, 8) == ["yellow"]
        report = handle.report()
    wanted = {
        "visual_tokens": (report.tokens_before, report.tokens),
        "visual_tokens_layer_average": (report.tokens_before, report.layer_averaged_tokens),
        "prefill_flops": (report.flops_before["full"], report.flops["full"]),
        "kv_bytes": (report.kv_bytes_before, report.kv_bytes),
    }
    for name, pair_of in wanted.items():
        for state, value in zip(("before", "after"), pair_of, strict=True):
            assert change[f'vlmcompress_{name}_total{{state="{state}"}}'] == pytest.approx(value), name
    assert change["vlmcompress_images_total"] == 1


def test_a_stream_brings_the_same_answer(url, client):
    before = numbers(url)
    chunks = list(client.chat.completions.create(**chat(), stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks).strip() == "yellow"
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == 2
    assert len({c.id for c in chunks}) == 1
    expect(url, before, 'vlmcompress_requests_total{outcome="answered"}')
    assert grown(url, before)['vlmcompress_visual_tokens_total{state="after"}'] == 144
    assert post(url, chat(stream=True)).text.endswith("data: [DONE]\n\n")


def test_text_alone_and_a_second_turn(url, client):
    before = numbers(url)
    assert client.chat.completions.create(**chat(picture=None)).usage.prompt_tokens < 40
    assert "vlmcompress_images_total" not in grown(url, before)
    again = chat()
    again["messages"] += [{"role": "assistant", "content": "yellow"}, {"role": "user", "content": QUESTION}]
    assert client.chat.completions.create(**again).choices[0].message.content
    assert grown(url, before)["vlmcompress_images_total"] == 1


def test_requests_wait_for_each_other_and_none_is_lost(url, client):
    before, answers = numbers(url), {}
    scenes = {"scene-1.png": QUESTION, "scene-3.png": "what shape is blue"}

    def ask(i, name, question):
        picture = address((SAMPLES / name).read_bytes())
        stream = bool(i % 2)
        found = client.chat.completions.create(**chat(picture, question), stream=stream)
        text = "".join(c.choices[0].delta.content or "" for c in found) if stream else found.choices[0].message.content
        answers[i, name] = text.strip()

    threads = [threading.Thread(target=ask, args=(i, *scene)) for i in range(4) for scene in scenes.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {"scene-1.png": "yellow", "scene-3.png": "triangle"}
    assert answers == {(i, name): wanted[name] for i in range(4) for name in scenes}
    expect(url, before, 'vlmcompress_requests_total{outcome="answered"}', 8)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


BAD = {
    "no json": (b"{", 400, "no JSON"),
    "a list": ([1], 400, "JSON object"),
    "no messages": ({"model": NAME}, 400, '"messages" is a list'),
    "another role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "one of system, user"),
    "no content": ({"messages": [{"role": "user"}]}, 400, "a text or a list of parts"),
    "a strange part": ({"messages": [{"role": "user", "content": [{"type": "smell"}]}]}, 400, "A part is"),
    "another model": (chat(model="gpt-9"), 400, "pinned to 'tiny-llava'"),
    "a strange field": (chat(tools=[]), 400, '"tools" is not supported'),
    "several answers": (chat(n=2), 400, '"n" is 1'),
    "a length of words": (chat(max_tokens="many"), 400, '"max_tokens" is a whole number'),
    "a length of zero": (chat(max_completion_tokens=0), 400, '"max_tokens" is a whole number'),
    "a corrupt picture": (chat(address(b"\x89PNG\r\n\x1a\n and nothing else")), 400, "could not be read as a picture"),
    "a cut picture": (chat(SCENE[:2022]), 400, "could not be read as a picture"),
    "no base64": (chat("data:image/png;base64,***"), 400, "does not come as base64"),
    "an address to fetch": (chat("http://127.0.0.1:1/a.png"), 400, "no other address is opened"),
    "a path": (chat(str(SAMPLES / "scene-1.png")), 400, "no other address is opened"),
    "too many pixels": (chat(address(encoded(Image.new("1", (12_000, 9_000))))), 400, "more than the 89 million"),
    "a thread of pixels": (chat(address(encoded(Image.new("L", (4_000, 2))))), 400, "30 times the other"),
    "a huge picture": (chat(address(bytes(hf_request.MAX_BYTES + 3))), 413, "larger than 20 MiB"),
    "too many pictures": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": SCENE}}] * 17}]},
        413, "17 images are more than the 16",
    ),
    "a huge body": (b" " * (hf_request.MAX_BODY + 1), 413, "larger than 64 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_get_a_sentence(url, case, monkeypatch):
    # lmms-eval, which other tests import, makes Pillow accept pictures that are cut off; the server never loads it
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    body, status, words = BAD[case]
    before = numbers(url)
    found = post(url, body)
    error = found.json()["error"]
    assert found.status_code == status and error["code"] == status and words in error["message"]
    assert error["message"].endswith(".") and "\n" not in error["message"]
    assert grown(url, before) == {f'vlmcompress_requests_refused_total{{status="{status}"}}': 1}


def test_the_server_goes_on_behind_bad_requests(client):
    assert client.chat.completions.create(**chat()).choices[0].message.content.strip() == "yellow"
    assert [model.id for model in client.models.list()] == [NAME]


def test_a_method_that_refuses_is_told_and_the_server_goes_on():
    with running(*load(str(DEFAULT)), "mustdrop", keep=2) as url:
        found = post(url, chat())
        assert found.status_code == 422 and "keep=2 is below" in found.json()["error"]["message"]
        events = post(url, chat(stream=True)).text
        assert '"message": "keep=2 is below' in events and events.endswith("data: [DONE]\n\n")
        assert post(url, chat(picture=None)).status_code == 200
        done = numbers(url)
        assert done['vlmcompress_requests_total{outcome="failed"}'] == 2


def test_a_client_that_leaves_ends_its_generation_and_a_full_queue_is_told():
    model, processor = load(str(DEFAULT))
    model.generation_config.eos_token_id = None  # answers as long as they may be
    with running(model, processor, "h2o", max_waiting=1) as url:
        body = chat(stream=True, max_tokens=8000)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as first:
            events = first.iter_lines()
            while "content" not in next(events):
                pass
            waiting = threading.Thread(target=post, args=(url, chat(max_tokens=4)))
            waiting.start()
            while numbers(url)["vlmcompress_requests_waiting"] < 1:
                time.sleep(0.05)
            full = post(url, chat())
            assert full.status_code == 503 and "1 requests wait already" in full.json()["error"]["message"]
        waiting.join(120)  # the one that waited is answered
        for _ in range(200):
            done = numbers(url)
            if (
                done['vlmcompress_requests_total{outcome="cancelled"}']
                and done['vlmcompress_requests_total{outcome="answered"}']
            ):
                break
            time.sleep(0.05)
        assert done['vlmcompress_requests_total{outcome="cancelled"}'] == 1
        assert done['vlmcompress_requests_total{outcome="answered"}'] == 1
        assert post(url, chat(max_tokens=2)).status_code == 200
    assert current_handle(model) is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "nonsense"], "no method 'nonsense'"),
        (["--keep", "0"], "keeps nothing"),
        (["--keep", "many"], "many"),
        (["-o", "wrong=1"], "no option 'wrong'"),
        (["--positions", "upside-down"], "positions"),
        (["--host", "256.0.0.1"], "cannot be listened on"),
    ],
)
def test_a_wrong_start_is_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(DEFAULT), "--port", "0", *options])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and words in said and len(said.splitlines()) == 1


def test_a_port_that_is_taken_is_told(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        main(["serve", str(DEFAULT), "--port", str(taken.getsockname()[1])])
    assert stop.value.code == 1 and "cannot be listened on" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["fastapi", "openai", "prometheus_client"])
def test_without_the_extra_a_sentence(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("hf", "hf_metrics"):
        monkeypatch.delitem(sys.modules, f"vlmcompress.serving.{name}", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(DEFAULT), "--port", "0"])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and said.endswith("pip install 'vlmcompress[serve-hf]'") and len(said.splitlines()) == 1


def test_a_processor_without_a_chat_template_is_refused():
    model, processor = load(str(DEFAULT))
    processor.chat_template = None
    with compress(model, "h2o") as handle, pytest.raises(ValueError, match="no chat template"):
        hf.create_app(NAME, handle, processor)
