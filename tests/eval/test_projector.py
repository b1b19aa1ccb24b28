# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench projector`` at a small size."""

import json

import pytest

from vlmcompress.commands.bench_projector import bench_projector

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 36,
    "patch_size": 4,
}  # fmt: skip


def test_shares_of_the_tower_are_written(tmp_path):
    report = bench_projector(tmp_path, 2, "cpu", SMALL, 24)
    (path,) = tmp_path.glob("bench-projector-*.json")
    stored = json.loads(path.read_text())
    assert list(report["tokens"]) == [64]
    row = stored["tokens"]["64"]
    assert row["share"] == pytest.approx(row["ms"]["median"] / stored["tower_ms"]["median"])
    assert row["ms"]["runs"] == stored["tower_ms"]["runs"] == 2
