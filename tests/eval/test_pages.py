# SPDX-License-Identifier: Apache-2.0
"""Compact tables: what stands in which column, and how pages are filled."""

import json

import pytest

from vlmcompress.catalog import families, recorded
from vlmcompress.eval.pages import compact, fill, main
from vlmcompress.eval.results import SCHEMA


def row(method, keep, right, layer_tokens, *, seeds=(), same=False):
    low, high = (0.95, 1.05) if same else (0.2, 0.9)
    task = {
        "n": 1200, "accuracy": right, "low": right - 0.02, "high": right + 0.01, "sd_over_seeds": None, "by_kind": {},
        "retained": {"value": right, "low": low, "high": high},
    }  # fmt: skip
    return named(method, keep, seeds) | {"tokens_in": 144.0, "layer_tokens": layer_tokens, "tasks": {"scenes": task}}


def named(method, keep, seeds=(), error=None):
    key = f"{method}-keep{keep}"
    return {"method": method, "keep": keep, "seeds": list(seeds), "options": {}, "key": key, "error": error}


@pytest.fixture
def report():
    return {
        "schema": SCHEMA,
        "model": {"name": "tiny", "fingerprint": "0", "parameters": 1, "dtype": "torch.float32"},
        "settings": {"tasks": {"scenes": 1200}, "max_new_tokens": 4, "batch_size": 1, "rounds": 0},
        "environment": {},
        "rows": [
            row("none", None, 0.9, 144.0),
            row("random", 48, 0.8, 48.0, seeds=(0, 1, 2)),
            row("random", 16, 0.6, 16.0, seeds=(0, 1, 2)),
            row("grid", 48, 0.85, 48.0),
            named("grid", 16, error="no budget"),
            row("fastv", 48, 0.9, 86.4, same=True),
            row("fastv", 16, 0.89, 67.2, same=True),
            row("transprune", 29, 0.7, 29.0),
        ],
    }


def test_lines_and_columns(report):
    lines = compact(report).splitlines()
    assert lines[0] == "| % right | scenes, 48 tokens | 16 tokens |"
    assert lines[2:-2] == [
        "| uncompressed | 90.0 | 90.0 |",
        "| random (3 seeds) | 80.0 | 60.0 |",
        "| grid | 85.0 | – |",
        "| fastv | 90.0 ≈ (86) | 89.0 ≈ (67) |",
        "| transprune | 70.0 (29) | 70.0 (29) |",
    ]
    assert "tiny, 144 visual tokens uncompressed, 1,200 questions of scenes" in lines[-1]
    assert "at most 2.0 points" in lines[-1]


def test_only_the_asked_methods_in_the_asked_order(report):
    lines = compact(report, ["grid", "uncompressed"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:-2]] == ["| grid", "| uncompressed"]
    with pytest.raises(ValueError, match="hold no row of magic"):
        compact(report, ["grid", "magic"])


def test_pages_are_filled_between_their_marks(report, tmp_path):
    (tmp_path / "results" / "one").mkdir(parents=True)
    (tmp_path / "results" / "one" / "report.json").write_text(json.dumps(report))
    first, second = "<!-- results/one: grid, random -->\nold\n<!-- end -->", "<!-- results/one -->\n<!-- end -->"
    page = f"before\n\n{first}\n\nbetween\n{second}\nafter\n"
    once = fill(page, tmp_path)
    assert fill(once, tmp_path) == once
    assert "\nold\n" not in once
    assert once.startswith("before\n\n<!-- results/one: grid, random -->\n| % right |")
    assert once.endswith("<!-- end -->\nafter\n")
    assert once.count("| grid | 85.0 | – |") == 2
    assert once.count("| fastv |") == 1


def test_the_command_writes_only_what_changes(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("no mark here\n")
    main([str(page)])
    assert page.read_text() == "no mark here\n"
    assert capsys.readouterr().out == ""


def test_a_bench_file_becomes_a_table_of_speed_ratios(tmp_path):
    def measured(speedup, predicted, average):
        return {
            "speedup": speedup,
            "predicted": predicted,
            "of_predicted": speedup / predicted,
            "layer_average": average,
        }

    part = {"uncompressed": {"prefill_ms": {"median": 4000.0, "runs": 10}}}
    bench = {
        "schema": "vlmcompress.bench-methods/1",
        "shape": "a small shape", "dtype": "torch.float32", "environment": {"threads": 2, "device": "a CPU"},
        "one_view": part | {"methods": {"grid": measured(1.8, 2.0, 64.0)}},
        "tiled": part | {"methods": {"globalcom2": measured(2.0, 2.1, 366.0)}},
    }  # fmt: skip
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "bench.json").write_text(json.dumps(bench))
    page = fill("<!-- results/bench.json -->\n<!-- end -->", tmp_path)
    assert "\n| grid | 64 | 1.80 | 2.00 | 0.90 |\n| globalcom2 | 366 | 2.00 | 2.10 | 0.95 |\n" in page
    assert "a small shape; float32, 2 threads of a CPU." in page and "uncompressed 4.0 and 4.0 s" in page


def test_a_gpu_bench_becomes_a_table_by_shape_and_batch(tmp_path):
    def case(milliseconds, **speedup):
        return {"ms": {"end_to_end": {"median": milliseconds}}, "speedup": speedup}

    grid = {"uncompressed": case(184.2), "grid": case(92, end_to_end=2.0)}
    pool = {"uncompressed": case(50.0), "pool": case(40, end_to_end=1.25)}
    bench = {
        "schema": "vlmcompress.bench-gpu/1", "new_tokens": 8, "text_tokens": 60, "dtype": "bfloat16", "weights": "random",
        "environment": {"torch": "2.11", "transformers": "5.17", "device": "a GPU"},
        "cells": [
            {"shape": "a", "batch": 1, "visual_tokens": 576, "cases": grid},
            {"shape": "b", "batch": 4, "visual_tokens": 144, "cases": pool},
            {"shape": "b", "batch": 16, "error": "out of memory"},
        ],
    }  # fmt: skip
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "gpu.json").write_text(json.dumps(bench))
    page = fill("<!-- results/gpu.json -->\n<!-- end -->", tmp_path)
    assert "\n| a, 1 | 576 | 184 | 2.00 | – |\n| b, 4 | 144 | 50 | – | 1.25 |\n" in page and "out of memory" not in page


def test_families_are_counted_from_the_matrix():
    cells, lines = recorded(), fill("<!-- families -->\nold\n<!-- end -->\nafter").splitlines()
    works = sum(not row["internvl video"] for row in cells.values())
    assert any(
        line.startswith("| internvl | ") and line.endswith(f"| {works} of {len(cells)} methods |") for line in lines
    )
    assert sum(line.endswith("| – |") for line in lines) == sum(
        f"{name} video" not in cells["none"] for name in families()
    )
    assert lines[-2:] == ["<!-- end -->", "after"] and "old" not in lines
