# SPDX-License-Identifier: Apache-2.0
"""The load benchmark, whole, on a small shape: real servers, real clients, one file."""

from __future__ import annotations

import json

from vlmcompress.commands import bench_serve


def test_two_servers_are_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    config = bench_serve.thin_tower()
    config.text_config.num_hidden_layers = 2
    monkeypatch.setattr(bench_serve, "shapes", lambda device: [("a small one", config, "vtc-cls")])
    bench_serve.bench_serve(tmp_path, 1, "cpu", clients=(1, 3))
    (path,) = tmp_path.iterdir()
    (shape,) = json.loads(path.read_text())["shapes"]
    assert 2 < shape["promise"] < 4  # 636 and 204 tokens
    for row, clients, requests in zip(shape["levels"], (1, 3), (8, 9), strict=True):
        plain, small = row["uncompressed"], row["compressed"]
        assert row["clients"] == clients and plain["requests"] == small["requests"] == requests
        assert plain["prompt_tokens"] - small["prompt_tokens"] == requests * (576 - 144)
        # looked at four times a second: requests as short as these can pass unseen
        assert plain["kv_blocks"] == small["kv_blocks"] > plain["kv_blocks_used_peak"] >= 0
        for found in (plain, small):
            assert found["requests_per_second"] > 0 and found["preemptions"] == 0
            assert found["first_token_ms"]["p50"] <= found["first_token_ms"]["p99"]
            assert found["between_tokens_ms"]["p50"] > 0
    assert "vtc-cls on a small one" in capsys.readouterr().out
    stamp = path.stat().st_mtime_ns
    assert bench_serve.bench_serve(tmp_path, 1, "cpu", clients=(1, 3))["shapes"] == [shape]
    assert path.stat().st_mtime_ns == stamp  # what is there already is not measured again
