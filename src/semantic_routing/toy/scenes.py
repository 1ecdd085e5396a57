"""Scenes of simple shapes: rendering, random layouts and random changes.

Lengths and positions are in pixels of a 32 x 32 picture, at any rendered size; y points down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from semantic_routing.toy.claims import Box, Kind

T = TypeVar("T")

CANVAS = 32
SUPERSAMPLING = 4
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (230, 25, 25),
    "green": (20, 160, 40),
    "blue": (30, 60, 240),
    "yellow": (250, 215, 10),
    "purple": (165, 30, 200),
    "cyan": (20, 210, 225),
}
CELL = 8
"""Side of a cell of the grid on which objects are placed, so that a short training learns captions, not rendering."""
SIZES = {"small": CELL - 1, "large": 2 * CELL - 1}
"""Side of an object's box: one cell, or two by two cells, less a pixel on the right and below."""
BACKGROUNDS = {"black": (10, 10, 10), "gray": (128, 128, 128), "white": (245, 245, 245)}


class Dice:
    """Random choices from uniform doubles only: fast, and the same in every NumPy release."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._uniform = self._stream(generator)

    @staticmethod
    def _stream(generator: np.random.Generator) -> Iterator[float]:
        while True:
            yield from generator.random(32).tolist()

    def chance(self, probability: float) -> bool:
        """Return True with this probability."""
        return next(self._uniform) < probability

    def between(self, low: int, high: int) -> int:
        """Draw an integer from ``low`` to ``high``, both included."""
        return low + int(next(self._uniform) * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        """Draw one option."""
        return options[int(next(self._uniform) * len(options))]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """Draw a key with a probability proportional to its weight."""
        rest = next(self._uniform) * sum(weights.values())
        for key, weight in weights.items():
            rest -= weight
            if rest < 0:
                return key
        return key

    def pick_two(self, options: Sequence[T]) -> tuple[T, T]:
        """Draw two different options."""
        i, j = self.between(0, len(options) - 1), self.between(0, len(options) - 2)
        return options[i], options[j + (j >= i)]


@dataclass(frozen=True)
class Object:
    """One drawn shape."""

    shape: str
    color: str
    size: str
    x: float
    """Distance of the centre from the left edge."""
    y: float
    """Distance of the centre from the top edge."""
    extent: int
    """Side of the box that the shape fills."""

    @property
    def box(self) -> Box:
        half = self.extent / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """A background and one to four objects that do not touch."""

    background: str
    objects: tuple[Object, ...]


def render(scene: Scene, size: int = CANVAS) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Draw a scene as RGB pixels, antialiased by drawing it four times larger."""
    side = SUPERSAMPLING * size
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        left, top, right, bottom = (round(edge * side / CANVAS) for edge in thing.box)
        right, bottom = right - 1, bottom - 1  # Pillow's boxes include the last pixel
        color = COLORS[thing.color]
        if thing.shape == "circle":
            draw.ellipse((left, top, right, bottom), fill=color)
        elif thing.shape == "square":
            draw.rectangle((left, top, right, bottom), fill=color)
        elif thing.shape == "triangle":
            draw.polygon(((left, bottom), (right, bottom), ((left + right) / 2, top)), fill=color)
        else:
            third = round((right - left + 1) / 3)
            draw.rectangle((left + third, top, right - third, bottom), fill=color)
            draw.rectangle((left, top + third, right, bottom - third), fill=color)
    return np.array(image.reduce(SUPERSAMPLING))


def _fits(thing: Object, others: Sequence[Object]) -> bool:
    """Tell whether an object is inside the picture and shares no cell with the others."""
    left, top, right, bottom = thing.box
    if min(left, top) < 0 or max(right, bottom) > CANVAS:
        return False
    return not any(
        max(abs(thing.x - other.x), abs(thing.y - other.y)) < (thing.extent + other.extent) / 2 for other in others
    )


def _anywhere(thing: Object, dice: Dice) -> Object:
    """Move an object to a random place of the grid."""
    cells = (thing.extent + 1) // CELL
    column, row = (dice.between(0, CANVAS // CELL - cells) for _ in range(2))
    return replace(thing, x=CELL * column + thing.extent / 2, y=CELL * row + thing.extent / 2)


def scatter(things: Sequence[Object], dice: Dice) -> tuple[Object, ...]:
    """Put objects at random free places, largest first; start again if an object finds no place."""
    order = sorted(range(len(things)), key=lambda i: -things[i].extent)
    while True:
        placed: dict[int, Object] = {}
        for i in order:
            for _ in range(12):
                thing = _anywhere(things[i], dice)
                if _fits(thing, list(placed.values())):
                    placed[i] = thing
                    break
            else:
                break
        if len(placed) == len(things):
            return tuple(placed[i] for i in range(len(things)))


def arrange(first: Object, where: str, second: Object, dice: Dice) -> tuple[Object, Object]:
    """Put the first object clearly ``where`` of the second: at most half as far across as along that direction."""
    along = (-1, 0) if where == "left" else (1, 0) if where == "right" else (0, -1) if where == "above" else (0, 1)
    while True:
        a, b = scatter((first, second), dice)
        offset = (a.x - b.x, a.y - b.y)
        distance = offset[0] * along[0] + offset[1] * along[1]
        across = abs(offset[0] * along[1]) + abs(offset[1] * along[0])
        if distance >= (a.extent + b.extent) / 2 and across <= distance / 2:
            return a, b


def complete(kind: Kind, large: bool, dice: Dice) -> Object:
    """Make an object of the kind, not yet placed; open attributes are random, and it is large only if allowed."""
    size = kind.size or ("large" if large and dice.chance(0.5) else "small")
    color = kind.color or dice.pick(tuple(COLORS))
    return Object(kind.shape or dice.pick(SHAPES), color, size, 0.0, 0.0, SIZES[size])


def changed(scene: Scene, dice: Dice) -> Scene | None:
    """Make one random change, to an object, their number, the layout or the background; None if it does not fit."""
    things = scene.objects
    i = dice.between(0, len(things) - 1)
    others = things[:i] + things[i + 1 :]
    change = dice.pick(("shape", "color", "size", "remove", "add", "flip", "background"))
    if change == "background":
        return replace(scene, background=dice.pick(tuple(BACKGROUNDS)))
    if change == "remove":
        return replace(scene, objects=others) if others else None
    if change == "flip":
        return replace(scene, objects=_flipped(things, dice))
    if change == "add":
        thing = _anywhere(complete(Kind(), False, dice), dice)
        return replace(scene, objects=(*things, thing)) if _fits(thing, things) else None
    if change == "shape":
        thing = replace(things[i], shape=dice.pick(SHAPES))
    elif change == "color":
        thing = replace(things[i], color=dice.pick(tuple(COLORS)))
    else:
        size = dice.pick(tuple(SIZES))
        thing = _anywhere(replace(things[i], size=size, extent=SIZES[size]), dice)
    return replace(scene, objects=(*others, thing)) if _fits(thing, others) else None


def _flipped(things: Sequence[Object], dice: Dice) -> tuple[Object, ...]:
    """Mirror the layout left-right or up-down, or swap its axes."""
    flip = dice.pick(("x", "y", "xy"))
    if flip == "x":
        return tuple(replace(thing, x=CANVAS - 1 - thing.x) for thing in things)
    if flip == "y":
        return tuple(replace(thing, y=CANVAS - 1 - thing.y) for thing in things)
    return tuple(replace(thing, x=thing.y, y=thing.x) for thing in things)
