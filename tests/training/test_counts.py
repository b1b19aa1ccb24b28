# SPDX-License-Identifier: Apache-2.0
"""Drawn counts and the expansion of collapsed prompts."""

from __future__ import annotations

import json

import pytest
import torch
import vectors
from models import IMAGE, PAD, prompts

from vlmcompress.flex import COUNTS, PROBABILITIES
from vlmcompress.training.boards import BoardModel, BoardStudy, boards, run
from vlmcompress.training.counts import CountSchedule, expand, is_collapsed

SPEC = [[5, "image", 7], [2, "image", 3, "image", 1], [4]]


def test_a_draw_is_a_pure_function_of_seed_step_and_micro_step():
    schedule = CountSchedule(COUNTS, PROBABILITIES, seed=3)
    drawn = [schedule.count(step, micro) for step in range(200) for micro in range(4)]
    assert drawn == [CountSchedule(COUNTS, PROBABILITIES, seed=3).count(s, m) for s in range(200) for m in range(4)]
    assert drawn != [CountSchedule(COUNTS, PROBABILITIES, seed=4).count(s, m) for s in range(200) for m in range(4)]
    assert any(len(set(drawn[i : i + 4])) > 1 for i in range(0, 800, 4))
    steps = CountSchedule(COUNTS, PROBABILITIES, seed=3, draw="step")
    assert all(len({steps.count(s, m) for m in range(4)}) == 1 for s in range(50))


def test_ranks_draw_alike_unless_told_otherwise():
    alike, apart = (CountSchedule(COUNTS, PROBABILITIES, sync_ranks=sync) for sync in (True, False))
    assert all(len({alike.count(s, 0, rank) for rank in range(8)}) == 1 for s in range(50))
    assert any(len({apart.count(s, 0, rank) for rank in range(8)}) > 1 for s in range(50))


def test_shares_and_mean_of_the_paper():
    schedule = CountSchedule(COUNTS, PROBABILITIES)
    drawn = torch.tensor([schedule.count(step) for step in range(20_000)])
    for count, share in zip(COUNTS, PROBABILITIES, strict=True):
        assert abs(float((drawn == count).float().mean()) - share) < 0.012
    assert schedule.mean == pytest.approx(184) and 1 - schedule.mean / 256 == pytest.approx(0.28125)
    path = vectors.folder("tokenflex") / "distribution.json"
    if path.exists():
        wanted = json.loads(path.read_text())
        assert (list(COUNTS), list(PROBABILITIES)) == (wanted["counts"], wanted["p"])
        assert schedule.mean == pytest.approx(wanted["mean_tokens"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_expanded_equals_a_prompt_made_with_that_many_places(side, tokens):
    collapsed, wanted = prompts(SPEC, 1, side), prompts(SPEC, tokens, side)
    assert is_collapsed(collapsed, IMAGE) and (tokens == 1 or not is_collapsed(wanted, IMAGE))
    ids = collapsed["input_ids"]
    collapsed["labels"] = ids.masked_fill((ids == IMAGE) | (collapsed["attention_mask"] == 0), -100)
    collapsed["token_weights"] = torch.where(collapsed["labels"] >= 0, ids / 100, 0.0)
    collapsed["position_ids"] = torch.zeros_like(ids)
    found = expand(collapsed, IMAGE, tokens, PAD)
    assert "position_ids" not in found and found["pixel_values"] is collapsed["pixel_values"]
    for key in ("input_ids", "attention_mask"):
        assert found[key].equal(wanted[key])
    text = (wanted["input_ids"] != IMAGE) & wanted["attention_mask"].bool()
    assert found["labels"].equal(wanted["input_ids"].masked_fill(~text, -100))
    assert found["token_weights"].equal(torch.where(text, wanted["input_ids"] / 100, 0.0))
    assert (found["labels"] != -100).sum() == (collapsed["labels"] != -100).sum()


def test_without_a_mask():
    found = expand({"input_ids": torch.tensor([[5, IMAGE, 6], [5, 6, 7]])}, IMAGE, 3, PAD)
    assert found["input_ids"].tolist() == [[5, IMAGE, IMAGE, IMAGE, 6], [5, 6, 7, PAD, PAD]]
    assert found["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


def test_bad_schedules():
    with pytest.raises(ValueError, match="draw is one of micro_batch, step"):
        CountSchedule(COUNTS, PROBABILITIES, draw="sample")
    with pytest.raises(ValueError, match="one probability for each count, and they add up to 1"):
        CountSchedule(COUNTS, (0.5, 0.5))


def test_boards_answer_their_questions():
    study = BoardStudy(side=4, questions=50)
    board, questions, answers, _ = boards(study, 20, torch.Generator().manual_seed(0))
    for cells, asked, said in zip(board.view(20, 4, 4), questions, answers, strict=True):
        for (kind, row, col, color), answer in zip(asked.tolist(), said.tolist(), strict=True):
            if kind == 0:
                assert answer == int(cells[row, col])
            elif kind == 1:
                assert answer == 5 + int((cells == color).sum())
            else:
                assert answer == 18 + int((cells[row] == color).any())


def test_a_short_study_of_boards_resumes(tmp_path):
    study = BoardStudy(side=4, counts=(4, 16), probabilities=(0.5, 0.5), untrained=(9,), steps=3, batch=8, questions=4,
                       width=16, test_boards=16)  # fmt: skip
    report = run(study, [0], tmp_path)
    lines = (tmp_path / "arms.jsonl").read_text().splitlines()
    assert [json.loads(line)["arm"] for line in lines] == ["fixed-4", "fixed-16", "flexible"]
    assert report["tokens_seen"]["fixed-16"] == 3 * 8 * 16 and len(report["gates"]) == 4
    (tmp_path / "arms.jsonl").write_text("\n".join(lines[:2]) + "\n")
    again = run(study, [0], tmp_path)
    assert again["accuracy"] == report["accuracy"] and "| flexible |" in (tmp_path / "report.md").read_text()
    assert sum(p.numel() for p in BoardModel(BoardStudy()).parameters()) == pytest.approx(3e5, rel=0.1)
