# SPDX-License-Identifier: Apache-2.0
"""tiny-clip in assets/: what it is, and that it finds videos by text, with and without clustering in its tower."""

from pathlib import Path

import open_clip
import pytest
import torch

import vlmcompress
from vlmcompress.eval.retrieval import load, measure
from vlmcompress.eval.rows import parse_row

FOLDER = Path(__file__).parents[2] / "assets" / "models" / "tiny-clip"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="part of the repository, not of the installed package")


@pytest.fixture(scope="module")
def shipped():
    return load(str(FOLDER))


def test_it_is_an_open_clip_model_of_less_than_5_mb(shipped):
    assert type(shipped.model) is open_clip.model.CLIP
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6
    card = (FOLDER / "README.md").read_text()
    assert "license: apache-2.0" in card and "vlmcompress train tiny-clip" in card


def test_it_finds_videos_by_text(shipped):
    rows = [parse_row(text) for text in ("none", "centerclip segments=4 keep=32")]
    plain, clustered = measure(shipped, rows, 64, lambda row, n: None)
    # chance is one of 64
    assert plain["recall"]["text_to_video_r5"]["value"] > 60
    assert clustered["recall"]["text_to_video_r5"]["value"] > 30


@torch.no_grad()
def test_the_door_in_the_documentation(shipped):
    with vlmcompress.compress(shipped.model, "centerclip", keep=16, segments=4) as handle:
        assert handle.encode_videos(torch.randn(1, 8, 3, 64, 64)).shape == (1, 128)
        assert handle.report().tokens == 64
