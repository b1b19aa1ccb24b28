# SPDX-License-Identifier: Apache-2.0
"""Scenes: coloured shapes, labels and loose digits on textured, cluttered backgrounds, drawn from a seed.

A scene is a pure function of ``(seed, index, SceneConfig)``; nothing here keeps state. Sizes are in pixels, so a
larger canvas with the same sizes gives relatively smaller objects (the high-resolution set), and moving the things of
one scene and drawing them again gives a video. `vlmcompress.training.questions` asks about a scene.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 235, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
}
SHAPES = ("circle", "triangle", "rectangle", "star", "ring", "cross", "diamond", "heart")
DARK = ("red", "blue", "teal", "brown", "black", "gray")  # these carry a white label, the others a black one
INKS = ("red", "blue", "teal", "brown", "black")  # colours of loose digits: readable on any of the backgrounds
LABELED = ("circle", "rectangle")  # shapes with room for a digit
DIGITS = tuple(str(d) for d in range(10))
OVERSAMPLE = 2  # things are drawn at twice the size and averaged down


@dataclass(frozen=True)
class SceneConfig:
    """What scenes may hold. Sizes are in pixels of the canvas, which is square unless ``height`` is given.

    ``max_repeats`` bounds how often one shape name may occur, so that most things can be named without doubt. Digits
    are all of one height, and their centres lie on lines ``digit_step`` apart, as type on a page does. With ``tile``
    things with a digit stay clear of the middle line of every side longer than a tile: a model that sees the canvas in
    two tiles there cuts it on that line. ``grain`` is the deviation of the noise on textured backgrounds.
    """

    canvas: int = 96
    height: int | None = None
    sizes: tuple[int, int] = (11, 23)
    objects: tuple[int, int] = (1, 6)
    max_repeats: int = 2
    digit_share: float = 0.75
    digit_size: int = 24
    digit_step: int = 8
    label_share: float = 0.7
    label_size: int = 32
    plain_share: float = 0.15
    clutter: int = 10
    grain: float = 3.0
    tile: int | None = None

    @property
    def box(self) -> tuple[int, int]:
        """Width and height."""
        return self.canvas, self.height or self.canvas

    def __post_init__(self):
        if not 1 <= self.objects[0] <= self.objects[1]:
            raise ValueError(f"objects must be a range of positive counts, got {self.objects}")
        largest = max(self.sizes[1], self.label_size)
        if largest * 2 > min(self.box):
            raise ValueError(f"Things of up to {largest} px do not fit a canvas of {min(self.box)} px")


@dataclass(frozen=True)
class Thing:
    """One object: ``kind`` is a shape name, or "digit" for a loose digit, whose value is ``label``."""

    kind: str
    color: str
    x: float
    y: float
    size: int
    label: str | None = None
    angle: float = 0.0


@dataclass(frozen=True)
class Scene:
    """An image and what is in it."""

    image: Image.Image
    things: tuple[Thing, ...]

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.kind != "digit")

    @property
    def digit(self) -> Thing | None:
        return next((t for t in self.things if t.kind == "digit"), None)


def make_scene(seed: int, index: int, config: SceneConfig = SceneConfig(), max_objects: int | None = None) -> Scene:
    """Draw scene ``index`` of the series ``seed``; ``max_objects`` lowers the count (for a curriculum)."""
    rng = np.random.default_rng((seed, index))
    things = place_things(rng, config, max_objects)
    return Scene(draw_things(draw_background(rng, config), things, rng), things)


def place_things(rng, config: SceneConfig, max_objects: int | None = None) -> tuple[Thing, ...]:
    """Choose kinds, colours and places; nothing overlaps, nothing is cut by the border."""
    low, high = config.objects
    high = high if max_objects is None else min(high, max_objects)
    count = int(rng.integers(min(low, high), high + 1))
    names = [n for n in SHAPES for _ in range(config.max_repeats)]
    kinds = list(rng.permutation(names)[:count]) if rng.random() < 0.5 else list(rng.permutation(SHAPES)[:count])
    if rng.random() < config.digit_share:
        kinds.append("digit")
    things: list[Thing] = []
    for kind in kinds:
        size = config.digit_size if kind == "digit" else int(rng.integers(config.sizes[0], config.sizes[1] + 1))
        label = str(rng.integers(10)) if kind == "digit" else None
        if kind in LABELED and rng.random() < config.label_share:
            size, label = config.label_size, str(rng.integers(10))
        step, tile = (config.digit_step, config.tile) if label else (0, None)
        spot = _free_spot(rng, config.box, size, things, step, tile)
        if spot is not None:
            color = str(rng.choice(INKS if kind == "digit" else list(COLORS)))
            tilt = 2 if label else 12
            things.append(Thing(str(kind), color, *spot, size, label, float(rng.uniform(-tilt, tilt))))
    return tuple(things)


def _free_spot(
    rng, box: tuple[int, int], size: int, things: list[Thing], step: int = 0, tile: int | None = None
) -> tuple[float, float] | None:
    """A place for a thing of ``size``, or None when the canvas is too full.

    With ``step`` it is on the lines of a grid, with ``tile`` clear of the middle line of every side longer than that.
    """
    half, (width, height) = size / 2, box
    for x, y in rng.uniform(half, np.array(box) - half, (60, 2)):
        if step:
            x, y = ((v // step + 0.5) * step for v in (x, y))
            if min(x, y) < half or x > width - half or y > height - half:
                continue
        if tile and any(side > tile and abs(v - side / 2) < half for v, side in ((x, width), (y, height))):
            continue
        if all(max(abs(x - t.x), abs(y - t.y)) > half + t.size / 2 + 2 for t in things):
            return float(x), float(y)
    return None


def draw_background(rng, config: SceneConfig) -> Image.Image:
    """A light background: plain, gradient, cloudy, striped or checked, with muted clutter."""
    n, box = max(config.box), (0, 0, *config.box)
    base = rng.integers(196, 256, 3)
    if rng.random() < config.plain_share:
        return Image.new("RGB", config.box, tuple(int(v) for v in base))
    style = int(rng.integers(4))
    other = np.clip(base + rng.integers(-45, 46, 3), 165, 255)
    if style == 0:  # gradient from one side to the other
        ramp = np.linspace(0, 1, n)[None].repeat(n, 0)
        weight = ramp if rng.random() < 0.5 else ramp.T
    elif style == 1:  # clouds: smooth noise
        cells = int(rng.integers(4, 12))
        noise = Image.fromarray((rng.random((cells, cells)) * 255).astype(np.uint8))
        weight = np.asarray(noise.resize((n, n), Image.Resampling.BICUBIC)) / 255
    else:  # stripes or a checkerboard
        period = int(rng.integers(4, 14))
        stripe = (np.arange(n) // period) % 2
        weight = stripe[None] ^ stripe[:, None] if style == 2 else stripe[None].repeat(n, 0)
        weight = weight.T if rng.random() < 0.5 else weight
    pixels = base + weight[..., None] * (other - base) + rng.normal(0, config.grain, (n, n, 1))
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _draw_clutter(ImageDraw.Draw(image), rng, base, n, config.clutter)
    return image.crop(box)


def _draw_clutter(draw: ImageDraw.ImageDraw, rng, base: np.ndarray, side: int, most: int) -> None:
    """Thin strokes and dots in shades of the background: edges that mean nothing."""
    for _ in range(int(rng.integers(most + 1))):
        shade = tuple(int(v) for v in np.clip(base - rng.integers(15, 70), 0, 255))
        x, y, dx, dy = (float(v) for v in rng.uniform(0, side, 4))
        if rng.random() < 0.5:
            draw.line((x, y, x + dx / 4 - side / 8, y + dy / 4 - side / 8), fill=shade, width=1)
        else:
            radius = 1 + dx / side
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)


def draw_things(background: Image.Image, things: tuple[Thing, ...], rng=None) -> Image.Image:
    """Draw ``things`` over a background; ``rng`` varies each colour a little."""
    width, height = background.size
    layer = Image.new("RGBA", (width * OVERSAMPLE, height * OVERSAMPLE))
    draw = ImageDraw.Draw(layer)
    for thing in things:
        shift = rng.integers(-22, 23, 3) if rng is not None else np.zeros(3, int)
        fill = (*(int(v) for v in np.clip(np.array(COLORS[thing.color]) + shift, 0, 255)), 255)
        _draw_thing(draw, thing, fill)
    small = layer.convert("RGBa").reduce(OVERSAMPLE).convert("RGBA")  # premultiplied, so that edges keep their colour
    image = background.copy()
    image.paste(small, (0, 0), small)
    return image


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, fill) -> None:
    x, y, r = (v * OVERSAMPLE for v in (thing.x, thing.y, thing.size / 2))
    if thing.kind == "digit":
        font = _font(round(2.4 * r))
        draw.text((x, y), thing.label, fill=fill, font=font, anchor="mm", stroke_width=1.5, stroke_fill=fill)
        return
    if thing.kind == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.kind == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(0.5 * r)))
    else:
        draw.polygon([(x + r * px, y + r * py) for px, py in _outline(thing.kind, thing.angle)], fill=fill)
    if thing.label is not None:
        ink = (255, 255, 255, 255) if thing.color in DARK else (0, 0, 0, 255)
        draw.text((x, y), thing.label, fill=ink, font=_font(round(1.8 * r)), anchor="mm", stroke_width=1.5)


def _outline(kind: str, angle: float) -> list[tuple[float, float]]:
    """Corner points of a shape inside the unit circle, turned by ``angle`` degrees (rectangles by their aspect)."""
    if kind == "rectangle":
        w, h = (0.95, 0.95 - abs(angle) / 30) if angle > 0 else (0.95 - abs(angle) / 30, 0.95)
        return [(-w, -h), (w, -h), (w, h), (-w, h)]
    if kind == "heart":
        t = np.linspace(0, 2 * math.pi, 32)
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16
        return list(zip(np.sin(t) ** 3, y, strict=True))
    if kind == "cross":
        a = 0.36
        corner = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        return corner + [(-x, -y) for x, y in corner]
    corners = {"triangle": 3, "diamond": 4, "star": 10}[kind]
    inner = 0.45 if kind == "star" else 1.0
    squeeze = 0.72 if kind == "diamond" else 1.0
    tilt = 0.0 if kind == "diamond" else math.radians(angle)
    radii = [1.0 if i % 2 == 0 else inner for i in range(corners)]
    turns = [2 * math.pi * i / corners - math.pi / 2 + tilt for i in range(corners)]
    return [(squeeze * r * math.cos(t), r * math.sin(t)) for r, t in zip(radii, turns, strict=True)]


@lru_cache(maxsize=64)
def _font(size: int):
    """Pillow's own font, so that every machine draws the same digits."""
    return ImageFont.load_default(size=size)


def patch_labels(scene: Scene, patch: int, threshold: float = 0.12) -> dict[str, np.ndarray]:
    """What each patch shows, for auxiliary heads.

    Returns arrays of shape [height // patch, width // patch]: ``color`` and ``kind`` (0 = background, then the order
    of `COLORS` and of `SHAPES` + digit) and ``digit`` (0 = none, 1–10 = the digit read there).
    """
    cols, rows = (side // patch for side in scene.image.size)
    labels = {name: np.zeros((rows, cols), np.int64) for name in ("color", "kind", "digit")}
    best = np.full((rows, cols), threshold)
    kinds = (*SHAPES, "digit")
    for thing in scene.things:
        alpha = np.asarray(draw_mask(thing, scene.image.size), np.float32) / 255
        cover = alpha[: rows * patch, : cols * patch].reshape(rows, patch, cols, patch).mean((1, 3))
        here = cover > best
        best = np.maximum(best, cover)
        labels["color"][here] = list(COLORS).index(thing.color) + 1
        labels["kind"][here] = kinds.index(thing.kind) + 1
        labels["digit"][here] = 0 if thing.label is None else int(thing.label) + 1
    return labels


def draw_mask(thing: Thing, box: tuple[int, int]) -> Image.Image:
    """The pixels of one thing as an 8-bit mask of a canvas of ``box`` (width, height)."""
    mask = Image.new("L", (box[0] * OVERSAMPLE, box[1] * OVERSAMPLE))
    bare = thing if thing.kind == "digit" else replace(thing, label=None)
    _draw_thing(ImageDraw.Draw(mask), bare, 255)
    return mask.reduce(OVERSAMPLE)
