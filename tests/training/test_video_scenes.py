# SPDX-License-Identifier: Apache-2.0
"""Clips and their questions: pure functions of a seed, with answers that follow from what the frames show."""

import json
from pathlib import Path

import numpy as np
import pytest

from vlmcompress.eval import tasks
from vlmcompress.training.questions import KINDS
from vlmcompress.training.video_scenes import (
    VIDEO_KINDS,
    Clip,
    VideoConfig,
    all_video_questions,
    ask_video,
    caption,
    clips,
    make_clip,
    video_vocabulary,
)
from vlmcompress.training.video_scenes_testset import video_rows


def test_same_seed_same_clip_other_split_other_clip():
    first, again, other = (next(clips(split, 1)) for split in ("train", "train", "test"))
    assert first.actors == again.actors != other.actors
    assert all(np.array_equal(a, b) for a, b in zip(first.frames, again.frames, strict=True))


@pytest.mark.parametrize("frames", [4, 8])
def test_things_stay_inside_and_apart_in_every_frame(frames):
    config = VideoConfig(frames=frames)
    events = set()
    for i in range(80):
        clip = make_clip(1, i, config)
        assert clip.actors and len(clip.frames) == frames
        events |= {actor.event for actor in clip.actors}
        for frame in range(frames):
            things = clip.shown(frame)
            for n, a in enumerate(things):
                assert a.size / 2 <= min(a.x, a.y) and max(a.x, a.y) <= 64 - a.size / 2
                for b in things[n + 1 :]:
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.size + b.size) / 2
    assert events == {"moves", "appears", "vanishes", "stays"}


def test_frames_show_what_the_clip_says():
    """What differs between two frames lies where a thing moved, appeared or vanished, and nowhere else."""
    for i in range(30):
        clip = make_clip(2, i)
        y, x = np.mgrid[:64, :64] + 0.5
        for frame in range(1, len(clip.frames)):
            before, after = (np.asarray(clip.frames[n], int) for n in (frame - 1, frame))
            changed = (before != after).any(-1)
            near = np.zeros((64, 64), bool)
            pairs = [(a.at(frame - 1, 8), a.at(frame, 8)) for a in clip.actors]
            for pair in pairs:
                for thing in pair if pair[0] != pair[1] else ():
                    if thing is not None:
                        here = np.maximum(abs(x - thing.x), abs(y - thing.y)) <= thing.size / 2 + 1
                        near |= here
                        assert (changed & here).any()
            assert not (changed & ~near).any()


def _sides(clip: Clip, frame: int) -> dict[str, tuple[str, str]]:
    return {t.kind: ("left" if t.x < 32 else "right", "top" if t.y < 32 else "bottom") for t in clip.shown(frame)}


def test_answers_follow_from_the_frames():
    """Answers from what single frames show, by other means than the generator's."""
    asked = set()
    for i in range(120):
        clip = make_clip(3, i)
        shown = [{t.kind: t for t in clip.shown(n)} for n in range(8)]
        for kind, questions in all_video_questions(clip, np.random.default_rng(i)).items():
            for qa in questions:
                words = qa.question.split()
                name, frame = words[-1], 0 if words[1] == "first" else 7
                there = [n for n in range(8) if name in shown[n]]
                if kind == "when":
                    change = there[0] if words[1] == "appears" else there[-1] + 1
                    assert qa.answer == ("early" if change <= 2 else "midway" if change == 4 else "late")
                elif kind == "way":
                    dx, dy = shown[7][name].x - shown[0][name].x, shown[7][name].y - shown[0][name].y
                    assert (abs(dx) < 1e-9) != (abs(dy) < 1e-9)
                    assert qa.answer == ("left" if dx < 0 else "right" if dx > 0 else "up" if dy < 0 else "down")
                elif kind == "side":
                    assert qa.answer in _sides(clip, frame)[name]
                elif kind == "existence":
                    assert qa.answer == ("yes" if name in shown[frame] else "no")
                elif kind == "count":
                    assert qa.answer == str(len(shown[frame]))
                elif kind == "color":
                    assert qa.answer == shown[there[0]][name].color
                elif kind == "order":
                    ends = [[n for n in range(8) if w in shown[n]] for w in (words[2], name)]
                    first, second = ((e[0] or e[-1] + 1) for e in ends)
                    assert qa.answer == ("yes" if first < second else "no")
                else:
                    assert qa.answer in {t.kind for s in shown for t in s.values()} | {
                        a.thing.color for a in clip.actors
                    }
                asked.add(kind)
    assert asked == set(VIDEO_KINDS)


def test_words_are_the_vocabulary_and_captions_name_every_thing():
    known = set(video_vocabulary())
    for i in range(60):
        clip = make_clip(4, i)
        said = caption(clip, np.random.default_rng(i))
        assert set(said.split()) <= known
        assert said.count(" and ") == len(clip.actors) - 1
        for actor in clip.actors:
            assert f"a {actor.thing.color} {actor.thing.kind} {actor.event}" in said
        for qa in ask_video(clip, np.random.default_rng(i), 40):
            assert {*qa.question.split(), qa.answer} <= known


def test_impossible_clips_are_refused():
    with pytest.raises(ValueError, match="multiple of 4"):
        VideoConfig(frames=6)
    with pytest.raises(ValueError, match="pixels"):
        VideoConfig(travel=(20, 60))
    with pytest.raises(ValueError, match="within 1 to"):
        VideoConfig(objects=(0, 2))
    with pytest.raises(ValueError, match="splits are"):
        clips("dev", 1)


def test_stored_set_is_the_noted_version_and_what_the_generator_makes():
    pytest.importorskip("pyarrow")
    note = json.loads((Path(tasks.__file__).parent / "scenes_video" / "test.json").read_text())
    samples = tasks.load("scenes-video")
    assert len(samples) == len({s.id for s in samples}) == note["questions"] == sum(note["kinds"].values())
    assert set(note["kinds"]) == {s.kind for s in samples} != set(KINDS)
    stored = {s.id: s for s in samples}
    for row, clip in zip(video_rows(3), clips("test", 3), strict=True):
        for n, qa in enumerate(row["questions"]):
            sample = stored[f"{row['id']}-{n}"]
            assert (sample.question, sample.answer, sample.kind) == (qa["question"], qa["answer"], qa["kind"])
            assert [np.asarray(f).tolist() for f in sample.image] == [np.asarray(f).tolist() for f in clip.frames]
