# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, with one-word answers that are right by construction, and captions of it.

Every question ends in its key word: the answer is predicted straight after it, which a small model learns much sooner.
"""

from collections import defaultdict
from dataclasses import dataclass

from .scenes import COLORS, DIGITS, SHAPES, Scene, Thing

KINDS = ("color", "shape", "count", "existence", "position", "relation", "digit")
PLURAL = {s: s + ("es" if s.endswith("s") else "s") for s in SHAPES}
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = tuple(str(n) for n in range(7))


@dataclass(frozen=True)
class QA:
    """One question, its one-word answer and the kind of the question."""

    question: str
    answer: str
    kind: str


def vocabulary() -> list[str]:
    """Every word that questions, answers and captions may hold, in a fixed order."""
    frames = (
        "what color is the shape where on which side at height is there a how many shapes are "
        "left right top bottom of above below digit stands alone yes no and"
    )
    words = [*frames.split(), *COLORS, *SHAPES, *PLURAL.values(), *DIGITS]
    return list(dict.fromkeys(words))


def names(scene: Scene) -> list[tuple[str, Thing]]:
    """Names that fit exactly one shape: "star" where it is the only star, and "red star" where stars differ."""
    groups: dict[str, list[Thing]] = defaultdict(list)
    for thing in scene.shapes:
        groups[thing.kind].append(thing)
        groups[f"{thing.color} {thing.kind}"].append(thing)
    return [(name, things[0]) for name, things in groups.items() if len(things) == 1]


def all_questions(scene: Scene, rng) -> dict[str, list[QA]]:
    """Every question that may be asked, by kind; none occurs twice. Existence is balanced between yes and no."""
    makers = {
        "color": _colors, "shape": _shapes, "count": _counts, "position": _positions,
        "relation": _relations, "digit": _digits, "existence": _existence,
    }  # fmt: skip
    return {kind: [QA(q, a, kind) for q, a in dict(makers[kind](scene, rng)).items()] for kind in KINDS}


def ask(scene: Scene, rng, count: int, weights: dict[str, float] | None = None) -> list[QA]:
    """Draw up to ``count`` different questions; ``weights`` give the share of each kind (default: equal)."""
    return draw_questions(all_questions(scene, rng), rng, count, weights)


def draw_questions(found: dict[str, list[QA]], rng, count: int, weights: dict[str, float] | None = None) -> list[QA]:
    """Up to ``count`` of the questions ``found`` by kind; ``weights`` give the share of each kind (default: equal)."""
    pools = {kind: list(rng.permutation(len(qas))) for kind, qas in found.items()}
    weights = weights or dict.fromkeys(found, 1.0)
    chosen: list[QA] = []
    while len(chosen) < count:
        kinds = [k for k, left in pools.items() if left and weights.get(k, 0) > 0]
        if not kinds:
            break
        total = sum(weights[k] for k in kinds)
        kind = kinds[int(rng.choice(len(kinds), p=[weights[k] / total for k in kinds]))]
        chosen.append(found[kind][pools[kind].pop()])
    return chosen


def caption(scene: Scene, rng) -> str:
    """The things in random order, e.g. "red star and blue ring and black 7" (for contrastive training)."""
    words = [f"{t.color} {t.label if t.kind == 'digit' else t.kind}" for t in scene.things]
    return " and ".join(words[i] for i in rng.permutation(len(words)))


def _colors(scene: Scene, rng):
    for name, thing in names(scene):
        if " " not in name:
            yield f"what color is the {name}", thing.color
    if scene.digit:
        yield "what color is the digit", scene.digit.color


def _shapes(scene: Scene, rng):
    for color in COLORS:
        found = [t for t in scene.shapes if t.color == color]
        if len(found) == 1:
            yield f"what shape is {color}", found[0].kind


def _counts(scene: Scene, rng):
    yield "how many shapes are there", str(len(scene.shapes))
    for color in COLORS:
        count = sum(t.color == color for t in scene.shapes)
        if count > 1 or (count == 1 and rng.random() < 0.4) or rng.random() < 0.1:
            yield f"how many shapes are {color}", str(count)
    for shape in SHAPES:
        count = sum(t.kind == shape for t in scene.shapes)
        if count > 1 or (count == 1 and rng.random() < 0.4) or rng.random() < 0.1:
            yield f"how many are {PLURAL[shape]}", str(count)


def _existence(scene: Scene, rng):
    there = {t.kind for t in scene.shapes}
    pairs = {f"{t.color} {t.kind}" for t in scene.shapes}
    for shape in rng.permutation(SHAPES):
        if shape in there or rng.random() < len(there) / len(SHAPES):
            yield f"is there a {shape}", "yes" if shape in there else "no"
    for thing in scene.shapes:
        yield f"is there a {thing.color} {thing.kind}", "yes"
        # a near miss: the shape in another colour, or the colour on another shape
        other_color = rng.random() < 0.5
        near = f"{rng.choice(list(COLORS))} {thing.kind}" if other_color else f"{thing.color} {rng.choice(SHAPES)}"
        if near not in pairs:
            yield f"is there a {near}", "no"


def _positions(scene: Scene, rng):
    width, height = scene.image.size
    for name, thing in names(scene):
        if abs(thing.x - width / 2) > 0.05 * width:
            yield f"on which side is the {name}", "left" if thing.x < width / 2 else "right"
        if abs(thing.y - height / 2) > 0.05 * height:
            yield f"at which height is the {name}", "top" if thing.y < height / 2 else "bottom"


def _relations(scene: Scene, rng):
    margin = scene.image.width * 0.1
    unique = [(n, t) for n, t in names(scene) if " " not in n]
    for a, first in unique:
        for b, second in unique:
            if a == b:
                continue
            if abs(first.x - second.x) > margin:
                yield f"is the {a} left of the {b}", "yes" if first.x < second.x else "no"
                yield f"is the {a} right of the {b}", "yes" if first.x > second.x else "no"
            if abs(first.y - second.y) > margin:
                yield f"is the {a} above the {b}", "yes" if first.y < second.y else "no"
                yield f"is the {a} below the {b}", "yes" if first.y > second.y else "no"


def _digits(scene: Scene, rng):
    if scene.digit:
        yield "what digit stands alone", scene.digit.label
    for name, thing in names(scene):
        if thing.label and " " not in name:
            yield f"what digit is on the {name}", thing.label
