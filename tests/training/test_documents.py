# SPDX-License-Identifier: Apache-2.0
"""The pages of the document test set: what stands on them, where text is, and that the stored set is the drawn one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vlmcompress.eval.tasks import base, load
from vlmcompress.training.documents import PAGES, SEED, SIDE, make_page, page_rows, text_cells
from vlmcompress.training.documents_study import Ink, look, summary
from vlmcompress.training.testset import content_hash


def test_every_second_page_is_dense_and_the_others_are_blank_paper():
    shares = [text_cells(make_page(SEED, i), 24, 24).mean() for i in range(12)]
    assert min(shares[::2]) > 0.4 and min(shares[1::2]) > 0 and max(shares[1::2]) < 0.2


def test_text_keeps_off_the_figures_and_is_where_it_is_said_to_be():
    for index in range(4):
        page = make_page(SEED, index)
        pixels = np.asarray(page.scene.image).astype(int).mean(-1)
        assert pixels[page.ink].mean() < 150 < pixels[~page.ink].mean()
        for thing in page.scene.things:
            half = thing.size / 2
            box = [max(0, round(v)) for v in (thing.y - half, thing.y + half, thing.x - half, thing.x + half)]
            assert not page.ink[box[0] : box[1], box[2] : box[3]].any()


def test_cells_hold_ink():
    page = make_page(SEED, 0)
    cells = text_cells(page, 24, 24)
    assert cells[3, 5] == page.ink[24:32, 40:48].any() and cells.shape == (24, 24)


def test_the_stored_set_is_what_is_drawn():
    samples = load("documents")
    note = json.loads((base.FOLDER / "documents" / "test.json").read_text())
    assert note["images"] == PAGES and note["questions"] == len(samples)
    stored = [s for s in samples if int(s.id.split("-")[2]) < 6]
    drawn = list(page_rows(6))
    assert [s.question for s in stored] == [qa["question"] for row in drawn for qa in row["questions"]]
    assert np.array_equal(np.asarray(stored[0].image), np.asarray(make_page(SEED, 0).scene.image))
    assert content_hash(drawn) == content_hash(list(page_rows(6)))
    digits = [s for s in samples if s.kind == "digit"]
    assert len(digits) > 100 and stored[0].image.size == (SIDE, SIDE)


def test_blank_pages_keep_less_and_text_stays():
    from pathlib import Path

    from vlmcompress.eval.loading import load as load_model
    from vlmcompress.method import create

    model, processor = load_model(str(Path(__file__).parents[2] / "assets" / "models" / "tiny-llava-next"))
    samples = load("documents")[:8]
    found = summary(look(model, processor, samples, create("token-correlation").methods[0]))
    assert found["blank"]["kept"] < 0.6 * found["dense"]["kept"]
    whole = summary(look(model, processor, samples, create("none").methods[0]))
    assert whole["all"]["text_kept"] == whole["all"]["kept"] == 1 and whole["all"]["on_text"] < found["all"]["on_text"]
    ink = summary(look(model, processor, samples, Ink(0.9)))
    assert ink["all"]["text_kept"] > 0.98


def test_only_a_test_split():
    with pytest.raises(ValueError, match="test split only"):
        load("documents", split="train")
