# SPDX-License-Identifier: Apache-2.0
"""The load's own arithmetic, and its clients against a small real HTTP server."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError

import pytest

from vlmcompress.cli import main
from vlmcompress.commands import bench_serve
from vlmcompress.commands.bench_serve import reason_in
from vlmcompress.serving.load import Answer, Load, blocks_used, body_of, samples, summary

METRICS = """# HELP vllm:num_preemptions_total Cumulative number of preemptions.
vllm:num_preemptions_total{engine="0",model_name="served"} 3.0
vllm:num_preemptions_total{engine="1",model_name="served"} 1e+01
vllm:kv_cache_usage_perc{engine="0",model_name="served"} 0.25
"""


def test_metrics_are_read_from_their_text():
    assert list(samples(METRICS, "vllm:num_preemptions_total")) == [3.0, 10.0]
    assert list(samples(METRICS, "vllm:kv_cache_usage_perc")) == [0.25]
    assert list(samples(METRICS, "vllm:num_preemptions")) == []


def test_blocks_are_a_share_of_all():
    assert blocks_used({"kv_share": 0.25, "running": 3.0}, 400)["kv_blocks_used_peak"] == 100


def test_percentiles_are_in_milliseconds():
    found = summary([Answer([0.1, 0.2, 0.4]), Answer([0.3, 0.35])], seconds=0.5)
    assert found["requests_per_second"] == 4.0
    assert found["first_token_ms"]["p50"] == pytest.approx(200)
    assert found["between_tokens_ms"]["p50"] == pytest.approx(100)


def test_no_two_requests_are_alike():
    load = Load(clients=2, requests=2)
    bodies = [json.dumps(body_of(load, "m", number)) for number in range(4)]
    urls = [json.loads(body)["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]
    assert len(set(bodies)) == len(set(urls)) == 4


LOG = """(APIServer pid=7) WARNING [a.py:2] failed, which can cause errors like `OSError: [Errno 24] Too many open files`.
(EngineCore pid=9) ERROR 11-26 14:00:00 [core.py:11]     raise ValueError(
(EngineCore pid=9) ERROR 11-26 14:00:00 [core.py:11] ValueError: 'fastv' cannot be served.
(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_cause_is_found_in_a_servers_log():
    assert reason_in(LOG) == "'fastv' cannot be served."
    assert reason_in("ModuleNotFoundError: No module named 'vllm'") == "No module named 'vllm'"
    assert reason_in("killed") == "killed" and reason_in("") == "no output"


def test_without_vllm_a_sentence(monkeypatch, capsys, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(bench_serve, "version", missing)
    with pytest.raises(SystemExit) as stop:
        main(["bench", "serve", "--out", str(tmp_path)])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and said.endswith("pip install 'vlmcompress[serve]'") and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


class Server(BaseHTTPRequestHandler):
    """Answers every chat with three chunks, and the fifth one with an error where asked to."""

    def do_GET(self):
        self.reply(200, METRICS.encode())

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked += 1
        if self.server.fails and self.server.asked == 5:
            self.reply(400, b"no")
            return
        chunks = [{"choices": [{"delta": {"role": "assistant", "content": None}}]}]
        chunks += [{"choices": [{"delta": {"content": "x"}}]}] * 3
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
        self.reply(200, "".join(lines).encode())

    def reply(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.asked, made.fails = 0, False
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def test_clients_ask_and_count(server):
    import asyncio

    from vlmcompress.serving.load import run

    found = asyncio.run(run(f"http://127.0.0.1:{server.server_port}", "m", Load(clients=3, requests=2, edge=24)))
    assert found["requests"] == server.asked == 6
    assert found["preemptions"] == 0 and found["between_tokens_ms"] is not None


def test_a_failed_request_is_no_measurement(server):
    import asyncio

    from vlmcompress.serving.load import run

    server.fails = True
    with pytest.raises(ValueError, match="1 of 6 requests failed: HTTP 400: no"):
        asyncio.run(run(f"http://127.0.0.1:{server.server_port}", "m", Load(clients=3, requests=2, edge=24)))
