# SPDX-License-Identifier: Apache-2.0
"""tiny-clip: videos and captions, the shortcut that trains the last block alone, the folder that open_clip reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F

from vlmcompress.methods.centerclip import CenterClip
from vlmcompress.training.retrieval import build_tokenizer, distinct_videos, make_video, pixels, recalls, words
from vlmcompress.training.tiny_clip import (
    CONTEXT,
    ClipRecipe,
    FeatureDataset,
    before_last,
    build_clip,
    locked_features,
    read_out,
    save,
    tokenized,
    train_tiny_clip,
)

BASE = Path(__file__).parents[2] / "assets" / "models" / "tiny-llava"
RECIPE = ClipRecipe(videos=12, steps=3, batch=6, validation_videos=8, measure_every=3, save_every=2)


def test_videos_are_functions_of_their_number():
    one, again, other = make_video(1, 0), make_video(1, 0), make_video(1, 1)
    assert one.caption == again.caption and (one.frames == again.frames).all()
    assert one.caption != other.caption
    assert pixels([one.frames]).shape == (1, 8, 3, 64, 64) and pixels([one.frames]).abs().max() <= 1
    captions = [video.caption for video in distinct_videos(2, 40)]
    assert len(set(captions)) == 40


def test_every_caption_can_be_told():
    tokenizer = build_tokenizer()
    ids = tokenized(tokenizer, [make_video(3, i).caption for i in range(40)])
    assert ids.shape == (40, CONTEXT) and not (ids == tokenizer.unk_token_id).any()
    # open_clip reads the text at the largest id
    assert (ids.max(1).values == tokenizer.eos_token_id).all() and tokenizer.eos_token_id == len(words()) - 1


def test_recalls_count_ties_as_misses():
    text = F.normalize(torch.eye(6) + 0.1, dim=-1)
    assert set(recalls(text, text).values()) == {100.0}
    alike = recalls(text, torch.eye(6)[:1].expand(6, -1))
    assert alike["text_to_video_r1"] == alike["text_to_video_r5"] == 0.0
    found = recalls(text, text.roll(1, 0))
    assert found["text_to_video_r1"] == 0.0


@torch.no_grad()
def test_the_last_block_alone_gives_what_the_tower_gives():
    model = build_clip(BASE, RECIPE).eval()
    x = pixels([make_video(4, 0).frames])[0]
    torch.testing.assert_close(read_out(model, before_last(model, x)), model.encode_image(x), atol=1e-5, rtol=1e-4)


def test_only_the_last_block_and_the_text_side_learn():
    model = build_clip(BASE, RECIPE)
    learnt = {name for name, parameter in model.visual.named_parameters() if parameter.requires_grad}
    assert "proj" in learnt and all(name.startswith(("proj", "ln_post", "transformer.resblocks.4.")) for name in learnt)
    assert model.token_embedding.weight.requires_grad


def test_features_of_a_clustered_tower():
    model = build_clip(BASE, RECIPE)
    plain = locked_features(model, 5, RECIPE)
    clustered = locked_features(model, 5, replace(RECIPE, segments=2, keep=16))
    assert plain["features"].shape == (12, 4, 65, 128) and clustered["features"].shape == (12, 2, 17, 128)
    assert plain["text"].equal(clustered["text"])
    assert replace(RECIPE, segments=2).method == CenterClip(keep=16, frames=8, segments=2)
    order = FeatureDataset(plain, 30, 0).order
    assert sorted(order[:12].tolist()) == list(range(12)) and not order[:12].equal(order[12:24])


@pytest.mark.parametrize("segments", [None, 2])
def test_training_writes_what_open_clip_reads(tmp_path, segments):
    output = train_tiny_clip(replace(RECIPE, segments=segments), BASE, tmp_path / "clip", tmp_path / "work")
    assert sum(path.stat().st_size for path in output.iterdir()) < 5e6
    model = open_clip.create_model(f"local-dir:{output}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{output}")(["a red star moves"])
    assert tokens.equal(tokenized(build_tokenizer(), ["a red star moves"]))
    with torch.no_grad():
        assert model.encode_text(tokens).shape == (1, 128)
        assert model.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, 128)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole = train_tiny_clip(RECIPE, BASE, tmp_path / "whole", tmp_path / "whole-work")
    train_tiny_clip(RECIPE, BASE, tmp_path / "cut", tmp_path / "cut-work")
    last = tmp_path / "cut-work" / "contrast" / "checkpoint-3"
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again = train_tiny_clip(RECIPE, BASE, tmp_path / "cut", tmp_path / "cut-work")
    name = "open_clip_model.safetensors"
    assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_half_precision_weights_keep_the_model(tmp_path):
    model = build_clip(BASE, RECIPE).eval()
    save(model, tmp_path)
    again = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    x = pixels([make_video(6, 0).frames])[0]
    with torch.no_grad():
        torch.testing.assert_close(again.encode_image(x), model.encode_image(x), atol=2e-2, rtol=2e-2)
