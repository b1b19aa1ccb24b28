# SPDX-License-Identifier: Apache-2.0
"""Scenes and questions: pure functions of a seed, with answers that follow from what was drawn."""

import numpy as np
import pytest

from vlmcompress.training.questions import KINDS, all_questions, ask, caption, names, vocabulary
from vlmcompress.training.scenes import COLORS, SHAPES, SceneConfig, Thing, draw_things, make_scene, patch_labels


def test_same_seed_same_scene_other_seed_other_scene():
    first, again, other = make_scene(5, 9), make_scene(5, 9), make_scene(6, 9)
    assert first.things == again.things
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


@pytest.mark.parametrize("canvas", [96, 192])
def test_things_lie_inside_and_apart(canvas):
    for i in range(50):
        things = make_scene(1, i, SceneConfig(canvas=canvas)).things
        for n, a in enumerate(things):
            assert a.size / 2 <= a.x <= canvas - a.size / 2
            assert a.size / 2 <= a.y <= canvas - a.size / 2
            for b in things[n + 1 :]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.size + b.size) / 2


def test_digits_have_one_size_and_stand_on_a_grid():
    digits = [t for i in range(80) for t in make_scene(6, i).things if t.label is not None]
    assert {t.kind for t in digits} == {"digit", "circle", "rectangle"}
    assert {t.size for t in digits} == {24, 32}
    assert all(t.x % 8 == t.y % 8 == 4 for t in digits)
    assert {t.label for t in digits} == set("0123456789")


def test_curriculum_lowers_the_count():
    assert all(len(make_scene(2, i, max_objects=2).shapes) <= 2 for i in range(50))
    assert max(len(make_scene(2, i).shapes) for i in range(50)) > 4


def test_impossible_config_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        SceneConfig(canvas=32)
    with pytest.raises(ValueError, match="positive counts"):
        SceneConfig(objects=(0, 3))


def test_no_question_is_repeated_within_a_scene():
    for i in range(100):
        asked = [qa.question for qa in ask(make_scene(3, i), np.random.default_rng(i), 40)]
        assert len(asked) == len(set(asked))


def _true_answer(question: str, scene) -> str:
    """Answer a question from the list of things, by other means than the generator."""
    words, shapes = question.split(), scene.shapes

    def find(*tokens):
        return [t for t in shapes if all(w in (t.kind, t.color) for w in tokens)]

    if question.startswith("what color"):
        return scene.digit.color if words[-1] == "digit" else find(words[-1])[0].color
    if question.startswith("what shape"):
        return find(words[-1])[0].kind
    if question.startswith("what digit"):
        return scene.digit.label if words[-1] == "alone" else find(words[-1])[0].label
    if question.startswith("how many"):
        last = words[-1]
        singular = {s + ("es" if s.endswith("s") else "s"): s for s in SHAPES}
        return str(len(shapes) if last == "there" else len(find(singular.get(last, last))))
    if question.startswith("is there"):
        return "yes" if find(*words[3:]) else "no"
    if question.startswith("on which side"):
        return "left" if find(*words[5:])[0].x < scene.image.width / 2 else "right"
    if question.startswith("at which height"):
        return "top" if find(*words[5:])[0].y < scene.image.width / 2 else "bottom"
    a, b = find(words[2])[0], find(words[-1])[0]
    holds = {"left": a.x < b.x, "right": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[words[3]]
    return "yes" if holds else "no"


def test_answers_follow_from_the_things():
    seen = set()
    for i in range(150):
        scene = make_scene(4, i)
        for kind, qas in all_questions(scene, np.random.default_rng(i)).items():
            for qa in qas:
                assert qa.answer == _true_answer(qa.question, scene), qa
                seen.add(kind)
    assert seen == set(KINDS)


def test_every_word_is_in_the_vocabulary():
    words = set(vocabulary())
    for i in range(100):
        scene, rng = make_scene(7, i), np.random.default_rng(i)
        for qa in ask(scene, rng, 20):
            assert {*qa.question.split(), qa.answer} <= words
        assert set(caption(scene, rng).split()) <= words


def test_names_fit_one_thing_only():
    scene = make_scene(0, 0)
    for name, thing in names(scene):
        words = name.split()
        assert [t for t in scene.shapes if all(w in (t.kind, t.color) for w in words)] == [thing]


def test_patch_labels_name_what_lies_there():
    scene = make_scene(0, 0)
    thing = Thing("rectangle", "red", 32, 48, 30)
    scene = type(scene)(draw_things(scene.image, (thing,)), (thing,))
    labels = patch_labels(scene, 8)
    assert labels["color"].shape == (12, 12)
    assert labels["color"][6, 4] == list(COLORS).index("red") + 1
    assert labels["kind"][6, 4] == SHAPES.index("rectangle") + 1
    assert labels["color"][0, 11] == labels["digit"].max() == 0
