# SPDX-License-Identifier: Apache-2.0
"""The study of a flexible model against fixed ones, in miniature: every part runs, and a second call does nothing."""

from __future__ import annotations

import json

from vlmcompress.training.flex_study import FlexStudy, run_study


def test_a_miniature_runs_and_resumes(tiny_folder, tmp_path):
    study = FlexStudy(
        str(tiny_folder), counts=(4, 36), probabilities=(0.5, 0.5), untrained=(9,), warm_steps=2, steps=2, batch=2,
        questions=2, tasks=("scenes",), limit=8, easy_vqa=False,
    )  # fmt: skip
    report = run_study(study, [0], tmp_path)
    assert set(report["accuracy"]["scenes"]) == {"flexible", "flexible-even", "fixed-4", "fixed-36"}
    assert report["tokens_seen"]["fixed-36"] == 2 * 2 * 36
    rows = [json.loads(line) for line in (tmp_path / "arms.jsonl").read_text().splitlines()]
    assert all(len(marks) == 8 for row in rows for marks in row["correct"]["scenes"].values())
    assert set(rows[0]["correct"]["scenes"]) == {"4", "9", "36"}
    stamp = (tmp_path / "arms.jsonl").stat().st_mtime_ns
    again = run_study(study, [0], tmp_path)
    assert again["accuracy"] == report["accuracy"] and (tmp_path / "arms.jsonl").stat().st_mtime_ns == stamp
    page = (tmp_path / "report.md").read_text()
    assert "| flexible |" in page and "9 (untrained)" in page and (tmp_path / "counts.png").stat().st_size > 1000
    assert json.loads((tmp_path / "fixed-4-0" / "config.json").read_text())["tokenflex"]["counts"] == [4]
