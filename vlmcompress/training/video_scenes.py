# SPDX-License-Identifier: Apache-2.0
"""Short clips of scenes: things that move, appear, vanish or stay, with questions about when, where and which way.

A clip is a pure function of ``(seed, index, VideoConfig)``. Every frame is drawn by `vlmcompress.training.scenes` over
one still background. Each shape name occurs once in a clip, so that its name alone says which thing is meant; nothing
overlaps in any frame. What happens early, midway or late stands wide apart, and every question ends in its key
word, as in `vlmcompress.training.questions`.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from .questions import QA, draw_questions
from .scenes import COLORS, SHAPES, SceneConfig, Thing, draw_background, draw_things

EVENTS = ("moves", "appears", "vanishes", "stays")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TIMES = ("early", "midway", "late")
VIDEO_KINDS = ("when", "way", "event", "side", "order", "existence", "count", "color")
#: seeds of the splits; nothing else in the project draws from them
SPLITS = {"train": 41_000_000, "validation": 41_500_000, "test": 64_210_000}


@dataclass(frozen=True)
class VideoConfig:
    """What clips may hold. Sizes and ``travel``, how far a thing moves in a clip, are in pixels.

    ``frames`` is a multiple of 4: what happens early happens within the first quarter, late in the last one. ``events``
    are the shares of `EVENTS`.
    """

    frames: int = 8
    objects: tuple[int, int] = (1, 4)
    travel: tuple[int, int] = (20, 36)
    events: tuple[float, ...] = (0.35, 0.25, 0.2, 0.2)
    scene: SceneConfig = field(
        default_factory=lambda: SceneConfig(canvas=64, sizes=(11, 17), clutter=4, grain=0.0, label_size=24)
    )

    def __post_init__(self):
        if self.frames < 4 or self.frames % 4:
            raise ValueError(f"frames must be a multiple of 4, got {self.frames}")
        if not 1 <= self.objects[0] <= self.objects[1] <= len(SHAPES):
            raise ValueError(f"objects must be a range within 1 to {len(SHAPES)}, got {self.objects}")
        room = min(self.scene.box) - self.scene.sizes[1]
        if not 0 < self.travel[0] <= self.travel[1] <= room:
            raise ValueError(f"travel must be a range within 1 to {room} pixels, got {self.travel}")


@dataclass(frozen=True)
class Actor:
    """A thing and what becomes of it: ``thing`` where it is first, ``dx`` and ``dy`` how far it goes.

    ``word`` is the way for a thing that moves, the time for one that appears or vanishes, "" for one that stays. It is
    visible from frame ``start`` up to, not including, frame ``stop``.
    """

    thing: Thing
    event: str
    word: str
    start: int
    stop: int
    dx: float = 0.0
    dy: float = 0.0

    def at(self, frame: int, frames: int) -> Thing | None:
        """The thing as ``frame`` of ``frames`` shows it, None while it is not there."""
        if not self.start <= frame < self.stop:
            return None
        share = frame / (frames - 1)
        return replace(self.thing, x=self.thing.x + share * self.dx, y=self.thing.y + share * self.dy)


@dataclass(frozen=True)
class Clip:
    """The frames of a clip and what happens in it."""

    frames: tuple[Image.Image, ...]
    actors: tuple[Actor, ...]

    def shown(self, frame: int) -> list[Thing]:
        """The things that ``frame`` shows; -1 is the last one."""
        frame %= len(self.frames)
        things = (actor.at(frame, len(self.frames)) for actor in self.actors)
        return [thing for thing in things if thing is not None]


def make_clip(seed: int, index: int, config: VideoConfig = VideoConfig(), max_objects: int | None = None) -> Clip:
    """Draw clip ``index`` of the series ``seed``; ``max_objects`` lowers the count (for a curriculum)."""
    rng = np.random.default_rng((seed, index))
    actors = place_actors(rng, config, max_objects)
    background = draw_background(rng, config.scene)

    def draw(canvas: Image.Image, n: int, frame: int) -> Image.Image:
        # a generator per thing: its shade is the same in every frame
        shade = np.random.default_rng((seed, index, 2, n))
        return draw_things(canvas, (actors[n].at(frame, config.frames),), shade)

    frames, stills = [], {(): background}  # what does not move is drawn once for all frames that show the same of it
    for frame in range(config.frames):
        there = [n for n, actor in enumerate(actors) if actor.start <= frame < actor.stop]
        still = tuple(n for n in there if actors[n].event != "moves")
        for known in range(1, len(still) + 1):
            if still[:known] not in stills:
                stills[still[:known]] = draw(stills[still[: known - 1]], still[known - 1], frame)
        canvas = stills[still]
        for n in there:
            if actors[n].event == "moves":
                canvas = draw(canvas, n, frame)
        frames.append(canvas)
    return Clip(tuple(frames), actors)


def clips(split: str, count: int, config: VideoConfig = VideoConfig()) -> Iterator[Clip]:
    """The first ``count`` clips of "train", "validation" or "test", always the same."""
    if split not in SPLITS:
        raise ValueError(f"The splits are {', '.join(SPLITS)}, not {split!r}")
    return (make_clip(SPLITS[split], i, config) for i in range(count))


def place_actors(rng, config: VideoConfig, max_objects: int | None = None) -> tuple[Actor, ...]:
    """Choose shapes, colours, events and places; no thing ever touches the way of another or leaves the canvas."""
    low, high = config.objects
    high = high if max_objects is None else min(high, max_objects)
    count = int(rng.integers(min(low, high), high + 1))
    taken: list[tuple[float, float, float, float]] = []
    actors = []
    for kind in rng.permutation(SHAPES)[:count]:
        event = str(rng.choice(EVENTS, p=np.array(config.events) / sum(config.events)))
        word, start, stop, dx, dy = _course(rng, event, config)
        size = int(rng.integers(config.scene.sizes[0], config.scene.sizes[1] + 1))
        spot = _free_way(rng, config.scene.box, size, dx, dy, taken)
        if spot is None:
            continue
        color, angle = str(rng.choice(list(COLORS))), float(rng.uniform(-12, 12))
        thing = Thing(str(kind), color, *spot, size, angle=angle)
        actors.append(Actor(thing, event, word, start, stop, dx, dy))
    return tuple(actors)


def _course(rng, event: str, config: VideoConfig) -> tuple[str, int, int, float, float]:
    """Word, first frame, end and movement of an event."""
    frames, quarter = config.frames, config.frames // 4
    if event == "moves":
        way = str(rng.choice(list(WAYS)))
        far = float(rng.uniform(*config.travel))
        return way, 0, frames, WAYS[way][0] * far, WAYS[way][1] * far
    if event == "stays":
        return "", 0, frames, 0.0, 0.0
    time = str(rng.choice(TIMES))
    low, high = {"early": (1, quarter), "midway": (2 * quarter, 2 * quarter), "late": (3 * quarter, frames - 1)}[time]
    change = int(rng.integers(low, high + 1))
    return (time, change, frames, 0.0, 0.0) if event == "appears" else (time, 0, change, 0.0, 0.0)


def _free_way(rng, box: tuple[int, int], size: int, dx: float, dy: float, taken: list) -> tuple[float, float] | None:
    """Where a thing of ``size`` may start on its way, or None when there is no room; the way is added to ``taken``."""
    half, (width, height) = size / 2, box
    low = np.array([half - min(dx, 0), half - min(dy, 0)])
    high = np.array([width - half - max(dx, 0), height - half - max(dy, 0)])
    for x, y in rng.uniform(low, high, (80, 2)):
        left, right = sorted((x, x + dx))
        top, bottom = sorted((y, y + dy))
        way = (left - half - 1, top - half - 1, right + half + 1, bottom + half + 1)
        if all(way[0] >= t[2] or way[2] <= t[0] or way[1] >= t[3] or way[3] <= t[1] for t in taken):
            taken.append(way)
            return float(x), float(y)
    return None


# what is said of a clip ----------------------------------------------------------------------------------------------


def video_vocabulary() -> list[str]:
    """Every word that questions, answers and captions of clips may hold, in a fixed order."""
    frames = (
        "at first last what color shape is the which way moves when appears vanishes stays before on side height "
        "there a how many shapes are left right top bottom up down early midway late yes no and"
    )
    return list(dict.fromkeys([*frames.split(), *COLORS, *SHAPES, *(str(n) for n in range(len(SHAPES) + 1))]))


def caption(clip: Clip, rng) -> str:
    """One sentence: what happens to each thing, in random order, e.g. "a red star moves left and a blue ring stays"."""
    said = [f"a {a.thing.color} {a.thing.kind} {a.event} {a.word}".strip() for a in clip.actors]
    return " and ".join(said[i] for i in rng.permutation(len(said)))


def all_video_questions(clip: Clip, rng) -> dict[str, list[QA]]:
    """Every question that may be asked, by kind; none occurs twice. Existence is about balanced between yes and no."""
    makers = {
        "when": _when, "way": _ways, "event": _events, "side": _sides, "order": _orders, "existence": _existence,
        "count": _counts, "color": _colors,
    }  # fmt: skip
    return {kind: [QA(q, a, kind) for q, a in makers[kind](clip, rng)] for kind in VIDEO_KINDS}


def ask_video(clip: Clip, rng, count: int, weights: dict[str, float] | None = None) -> list[QA]:
    """Draw up to ``count`` different questions; ``weights`` give the share of each kind (default: equal)."""
    return draw_questions(all_video_questions(clip, rng), rng, count, weights)


def _when(clip: Clip, rng):
    for actor in clip.actors:
        if actor.word in TIMES:
            yield f"when {actor.event} the {actor.thing.kind}", actor.word


def _ways(clip: Clip, rng):
    for actor in clip.actors:
        if actor.event == "moves":
            yield f"which way moves the {actor.thing.kind}", actor.word


def _events(clip: Clip, rng):
    """The thing of an event, where there is one alone."""
    groups: dict[str, list[Thing]] = defaultdict(list)
    for actor in clip.actors:
        groups[actor.event].append(actor.thing)
        if actor.event == "moves":
            groups[f"moves {actor.word}"].append(actor.thing)
    for event, things in groups.items():
        if len(things) == 1:
            yield f"what shape {event}", things[0].kind
            yield f"what color {event}", things[0].color


def _sides(clip: Clip, rng):
    width, height = clip.frames[0].size
    for name, frame in (("first", 0), ("last", -1)):
        for thing in clip.shown(frame):
            if abs(thing.x - width / 2) > 0.08 * width:
                yield f"at {name} on which side is the {thing.kind}", "left" if thing.x < width / 2 else "right"
            if abs(thing.y - height / 2) > 0.08 * height:
                yield f"at {name} at which height is the {thing.kind}", "top" if thing.y < height / 2 else "bottom"


def _orders(clip: Clip, rng):
    """Which of two comes or goes first; the frames of the two lie a quarter of the clip or more apart."""
    for event in ("appears", "vanishes"):
        moments = [(a.thing.kind, a.word, a.start or a.stop) for a in clip.actors if a.event == event]
        for first, word, moment in moments:
            for second, other, later in moments:
                if word != other:
                    yield f"{event} the {first} before the {second}", "yes" if moment < later else "no"


def _existence(clip: Clip, rng):
    for name, frame in (("first", 0), ("last", -1)):
        there = {thing.kind for thing in clip.shown(frame)}
        gone = {actor.thing.kind for actor in clip.actors} - there
        for kind in sorted(there):
            yield f"at {name} is there a {kind}", "yes"
        others = [kind for kind in rng.permutation(SHAPES) if kind not in there | gone]
        # what the clip shows at another time is the harder no; shapes it never shows fill up to as many as there are yes
        for kind in [*sorted(gone), *others[: max(0, len(there) - len(gone))]]:
            yield f"at {name} is there a {kind}", "no"


def _counts(clip: Clip, rng):
    yield "at first how many shapes are there", str(len(clip.shown(0)))
    yield "at last how many shapes are there", str(len(clip.shown(-1)))


def _colors(clip: Clip, rng):
    for actor in clip.actors:
        yield f"what color is the {actor.thing.kind}", actor.thing.color
