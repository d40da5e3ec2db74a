"""A captioned data set that needs nothing from outside: drawings of one or two coloured shapes.

    "a small red circle at the top left and a large blue cross at the bottom right on a grey background"

A drawing is a background and one shape in one or two of the four quadrants; a shape has a size, a colour and a form.
Some compositions of colour, form and position are held out: no training drawing shows them, though each two of the
three occur together there, so that a model is asked for what it never saw as a whole. :func:`read_drawing` goes the
other way, from pixels alone: it matches each quadrant with every form and size at every place, and knows no caption.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

__all__ = [
    "ATTRIBUTES",
    "Drawing",
    "Shape",
    "draw",
    "held_out_compositions",
    "random_drawing",
    "read_drawing",
    "score",
]

COLOURS = {
    "red": (215, 35, 40),
    "green": (45, 155, 60),
    "blue": (40, 75, 215),
    "yellow": (245, 215, 40),
    "purple": (140, 50, 165),
    "cyan": (45, 195, 205),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "black": (25, 25, 25),
    "pink": (250, 190, 205),
}
FORMS = ("circle", "square", "triangle", "cross")
RADII = {"small": 0.31, "large": 0.44}  # half a shape's side, as a share of a quadrant's
POSITIONS = {"top left": (0, 0), "top right": (0, 1), "bottom left": (1, 0), "bottom right": (1, 1)}
Composition = tuple[str, str, str]  # colour, form, position
ATTRIBUTES = ("count", "position", "form", "colour", "size", "background")

_SHAPE = re.compile(
    rf"an? ({'|'.join(RADII)}) ({'|'.join(COLOURS)}) ({'|'.join(FORMS)}) at the ({'|'.join(POSITIONS)})"
)
_OVERSAMPLING = 4  # drawn this much larger, then averaged down: smooth edges
_COLOUR_JITTER = 6  # of 255, uniform, each channel of the background and of each shape
_PLACE_JITTER = 0.03  # of a quadrant's side
_RADIUS_JITTER = 0.015


@dataclass(frozen=True)
class Shape:
    """One shape: size in RADII, colour in COLOURS, form in FORMS, position in POSITIONS."""

    size: str
    colour: str
    form: str
    position: str

    def __str__(self) -> str:
        article = "an" if self.size[0] in "aeiou" else "a"
        return f"{article} {self.size} {self.colour} {self.form} at the {self.position}"


@dataclass(frozen=True)
class Drawing:
    """A background in BACKGROUNDS and the shapes on it, each in a quadrant of its own, in the order of POSITIONS."""

    shapes: tuple[Shape, ...]
    background: str

    @property
    def caption(self) -> str:
        """The one caption that says all there is to see."""
        return f"{' and '.join(map(str, self.shapes))} on a {self.background} background"

    @classmethod
    def from_caption(cls, caption: str) -> Drawing:
        """The drawing that has this caption.

        Raises:
            ValueError: the caption is not one that :attr:`caption` gives.
        """
        match = re.fullmatch(rf"(.+) on a ({'|'.join(BACKGROUNDS)}) background", caption)
        shapes = [_SHAPE.fullmatch(words) for words in match[1].split(" and ")] if match else [None]
        drawing = cls(tuple(Shape(*shape.groups()) for shape in shapes), match[2]) if all(shapes) else None
        places = [list(POSITIONS).index(shape.position) for shape in drawing.shapes] if drawing else []
        if drawing is None or drawing.caption != caption or len(places) > 2 or places != sorted(set(places)):
            raise ValueError(f"caption must be one of a drawing of shapes, got {caption!r}")
        return drawing


def held_out_compositions(seed: int = 0) -> frozenset[Composition]:
    """The compositions training never shows: at each position one colour for each form, each pair of them only once."""
    colours = [str(colour) for colour in np.random.default_rng(seed).permutation(list(COLOURS))]
    return frozenset(
        (colours[(row + column) % len(colours)], form, position)
        for row, form in enumerate(FORMS)
        for column, position in enumerate(POSITIONS)
    )


def random_drawing(rng: np.random.Generator, held_out: frozenset[Composition], *, show_held_out: bool) -> Drawing:
    """A drawing with no held-out composition, or, with show_held_out, one with at least one.

    Raises:
        ValueError: show_held_out, but there is no held-out composition to show.
    """
    if show_held_out and not held_out:
        raise ValueError("held_out must hold a composition to show, got none")
    while True:
        count = int(rng.integers(1, 3))
        places = sorted(rng.choice(len(POSITIONS), size=count, replace=False))
        shapes = tuple(
            Shape(_pick(rng, RADII), _pick(rng, COLOURS), _pick(rng, FORMS), list(POSITIONS)[place]) for place in places
        )
        if any((shape.colour, shape.form, shape.position) in held_out for shape in shapes) == show_held_out:
            return Drawing(shapes, _pick(rng, BACKGROUNDS))


def _pick(rng: np.random.Generator, names: dict[str, object] | tuple[str, ...]) -> str:
    return list(names)[int(rng.integers(len(names)))]


def draw(drawing: Drawing, size: int, rng: np.random.Generator) -> Image.Image:
    """The drawing in size x size pixels; place, radius and colours vary a little with the generator."""
    background = _jitter_colour(BACKGROUNDS[drawing.background], rng)
    canvas = Image.new("RGB", (size * _OVERSAMPLING, size * _OVERSAMPLING), background)
    pen = ImageDraw.Draw(canvas)
    side = size * _OVERSAMPLING / 2
    for shape in drawing.shapes:
        row, column = POSITIONS[shape.position]
        y, x = (np.array([row, column]) + 0.5 + rng.uniform(-_PLACE_JITTER, _PLACE_JITTER, size=2)) * side
        radius = (RADII[shape.size] + rng.uniform(-_RADIUS_JITTER, _RADIUS_JITTER)) * side
        _draw_form(pen, shape.form, x, y, radius, _jitter_colour(COLOURS[shape.colour], rng))
    return canvas.resize((size, size), Image.Resampling.BOX)


def _jitter_colour(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    shifted = np.array(colour) + rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)
    return tuple(int(channel) for channel in shifted.clip(0, 255))


def _draw_form(
    pen: ImageDraw.ImageDraw, form: str, x: float, y: float, radius: float, fill: tuple[int, int, int] | int
) -> None:
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if form == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif form == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    elif form == "triangle":
        pen.polygon([(x, top), (right, bottom), (left, bottom)], fill=fill)
    else:
        arm = radius * 0.3
        pen.rectangle((left, y - arm, right, y + arm), fill=fill)
        pen.rectangle((x - arm, top, x + arm, bottom), fill=fill)


def read_drawing(image: np.ndarray) -> Drawing:
    """What a drawing shows, from its pixels alone.

    The background is the colour nearest to the median of the image's rim. A quadrant with enough pixels unlike the
    background holds a shape: its colour is the palette's nearest to the median of the pixels most unlike the
    background, its form and size those whose coverage mask, at the best of all places, differs least from it.

    Args:
        image: (size, size, 3) uint8.
    """
    pixels = image.astype(np.float32)
    size = pixels.shape[0]
    rim = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(rim, axis=0)
    half = size // 2
    shapes = []
    for position, (row, column) in POSITIONS.items():
        quadrant = pixels[row * half : (row + 1) * half, column * half : (column + 1) * half]
        difference = np.linalg.norm(quadrant - ground, axis=-1)
        covered = difference > 0.5 * np.quantile(difference, 0.98)
        if np.quantile(difference, 0.95) < 45 or covered.sum() < 0.04 * half * half:
            continue
        core = quadrant[difference >= np.quantile(difference[covered], 0.5)]
        ink = np.median(core, axis=0)
        axis = ink - ground
        coverage = ((quadrant - ground) @ axis / (axis @ axis)).clip(0, 1)
        form, scale = _best_match(coverage)
        shapes.append(Shape(scale, _nearest(ink, COLOURS), form, position))
    return Drawing(tuple(shapes), _nearest(ground, BACKGROUNDS))


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.square(colour - np.array(palette[name])).sum()))


@lru_cache(maxsize=8)
def _templates(side: int) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Coverage masks (count, side * side) of every form, size and place within a quadrant, and what each one is."""
    labels, masks = [], []
    radii = [(name, share + shift) for name, share in RADII.items() for shift in (-_RADIUS_JITTER, 0, _RADIUS_JITTER)]
    shifts = np.linspace(-2 * _PLACE_JITTER, 2 * _PLACE_JITTER, 9)
    for form, (name, share), dy, dx in itertools.product(FORMS, radii, shifts, shifts):
        canvas = Image.new("L", (side * _OVERSAMPLING, side * _OVERSAMPLING))
        unit = side * _OVERSAMPLING
        _draw_form(ImageDraw.Draw(canvas), form, (0.5 + dx) * unit, (0.5 + dy) * unit, share * unit, 255)
        masks.append(np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32).ravel() / 255)
        labels.append((form, name))
    return labels, np.stack(masks)


def _best_match(coverage: np.ndarray) -> tuple[str, str]:
    labels, masks = _templates(coverage.shape[0])
    mismatch = np.square(masks).sum(1) - 2 * masks @ coverage.ravel()  # plus a constant
    return labels[int(mismatch.argmin())]


def score(asked: Drawing, seen: Drawing) -> dict[str, bool]:
    """Which attributes of a drawing are as asked, by the names in ATTRIBUTES, and "exact", all of them.

    Form, colour and size are right if they are so for every shape asked for, at its position.
    """
    found = {shape.position: shape for shape in seen.shapes}
    positions = {shape.position for shape in asked.shapes}

    def all_right(attribute: str) -> bool:
        return all(
            shape.position in found and getattr(found[shape.position], attribute) == getattr(shape, attribute)
            for shape in asked.shapes
        )

    result = {
        "count": len(seen.shapes) == len(asked.shapes),
        "position": set(found) == positions,
        "form": all_right("form"),
        "colour": all_right("colour"),
        "size": all_right("size"),
        "background": seen.background == asked.background,
    }
    return result | {"exact": all(result.values())}


def write_shapes(out: Path, *, train: int, heldout: int, size: int = 32, seed: int = 0) -> dict[str, int]:
    """Write the data set as two folders of images with same-stem captions, OUT/train and OUT/heldout.

    OUT/heldout.json lists the held-out compositions.

    Args:
        out: a new or empty folder.
        train: drawings without a held-out composition.
        heldout: drawings with one.
        size: side of a drawing in pixels, an even number >= 16.
        seed: the data set is a function of it and the sizes.

    Returns:
        The number of drawings by folder.

    Raises:
        ValueError: a number out of range, or out is not empty.
    """
    if size < 16 or size % 2:
        raise ValueError(f"size must be an even number >= 16, got {size}")
    if train < 1 or heldout < 0:
        raise ValueError(f"train must be >= 1 and heldout >= 0, got {train} and {heldout}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {out}")
    compositions = held_out_compositions(seed)
    for number, (folder, count) in enumerate((("train", train), ("heldout", heldout))):
        rng = np.random.default_rng((seed, number))
        directory = out / folder
        directory.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            drawing = random_drawing(rng, compositions, show_held_out=folder == "heldout")
            draw(drawing, size, rng).save(directory / f"{index:06}.png", compress_level=1)
            (directory / f"{index:06}.txt").write_text(drawing.caption + "\n", encoding="utf-8")
    listing = [dict(zip(("colour", "form", "position"), parts, strict=True)) for parts in sorted(compositions)]
    (out / "heldout.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
    return {"train": train, "heldout": heldout}
