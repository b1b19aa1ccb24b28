# SPDX-License-Identifier: Apache-2.0
"""The evaluation tasks: stable, versioned, and apart from everything trained on."""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from vlmcompress.eval import tasks
from vlmcompress.training.testset import TEST_SETS, scene_rows

FOLDER = Path(tasks.__file__).parent


@pytest.mark.parametrize("name", sorted(TEST_SETS))
def test_stored_set_is_the_noted_version(name):
    folder = FOLDER / name.replace("-", "_")
    note = json.loads((folder / "test.json").read_text())
    assert hashlib.sha256((folder / "test.parquet").read_bytes()).hexdigest() == note["sha256"]
    samples = tasks.load(name)
    assert len(samples) == note["questions"] >= 1000
    assert len({s.id for s in samples}) == len(samples)


@pytest.mark.parametrize("name", sorted(TEST_SETS))
def test_stored_set_is_what_the_generator_makes(name):
    stored = {s.id: s for s in tasks.load(name)}
    for row in scene_rows(name, 3):
        for n, qa in enumerate(row["questions"]):
            sample = stored[f"{row['id']}-{n}"]
            assert (sample.question, sample.answer, sample.kind) == (qa["question"], qa["answer"], qa["kind"])


def test_limit_is_seeded_and_stratified():
    whole, part = tasks.load("scenes"), tasks.load("scenes", limit=240)
    assert [s.id for s in part] == [s.id for s in tasks.load("scenes", limit=240)]
    assert [s.id for s in part] != [s.id for s in tasks.load("scenes", limit=240, seed=1)]
    assert len(part) == 240
    share = Counter(s.kind for s in part)
    for kind, count in Counter(s.kind for s in whole).items():
        assert abs(share[kind] - 240 * count / len(whole)) <= 1


def test_easy_vqa_is_the_whole_test_split():
    pytest.importorskip("easy_vqa")
    samples = tasks.load("easy-vqa")
    assert len(samples) == 9673
    assert len({s.answer for s in samples}) == 13
    assert np.asarray(samples[0].image).shape == (64, 64, 3)


def test_errors_say_what_exists(monkeypatch):
    with pytest.raises(ValueError, match="easy-vqa, scenes"):
        tasks.load("vqa")
    with pytest.raises(ValueError, match="test split only"):
        tasks.load("scenes", split="train")
    with pytest.raises(ValueError, match="at least 1"):
        tasks.load("scenes", limit=0)
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match="eval"):
        tasks.load("easy-vqa")


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("Red.", "red", True),
        ("yes, it is", "yes", True),
        ("", "no", False),
        ("reddish", "red", False),
        ("7", "7", True),
    ],
)
def test_score(said, answer, right):
    assert tasks.score(said, answer) is right
