# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench selection`` at a small size."""

import json

import torch

from vlmcompress.commands.bench_selection import bench_selection
from vlmcompress.eval import selection
from vlmcompress.ops.diversity import diverse_order


def test_the_formulation_of_the_paper_gives_the_same_order():
    x = selection.features(selection.Shape(2, 300, 40), 48, "cpu")
    pivot = torch.tensor([4, 9])
    assert selection.step_by_step(x, pivot, 40).equal(diverse_order(x, pivot, 40))


def test_report(tmp_path, capsys):
    report = bench_selection(tmp_path, 2, "cpu", selection.Shape(2, 200, 30, widths=(16, 64)))
    (path,) = tmp_path.glob("bench-selection-*.json")
    assert json.loads(path.read_text()) == report
    for row, width in zip(report["widths"], (16, 64), strict=True):
        assert row["width"] == width and row["same_order"] == 1
        assert row["gflop"] == 2e-9 * 2 * 30 * 200 * width
        assert all(0 < row["best_ms"][name] <= timing["median"] for name, timing in row["ms"].items())
    assert "30 of 200 tokens" in capsys.readouterr().out
