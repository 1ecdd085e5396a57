"""Scenes of simple shapes: how they are drawn, laid out at random and changed at random.

Lengths and positions are in pixels of a 32 x 32 picture, whatever size is rendered; y points down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from semantic_routing.data.claims import Box, Kind

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
SIZES = {"small": (9, 10), "large": (14, 15)}
"""The shortest and longest side of an object's box."""
BACKGROUNDS = {"black": (10, 10, 10), "gray": (128, 128, 128), "white": (245, 245, 245)}
BORDER, GAP = 0, 2
"""Free pixels between an object's box and the picture's edge, and between two boxes."""


class Dice:
    """Random choices from uniform doubles alone: cheap, and the same in every NumPy release."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._uniform = self._stream(generator)

    @staticmethod
    def _stream(generator: np.random.Generator) -> Iterator[float]:
        while True:
            yield from generator.random(32).tolist()

    def chance(self, probability: float) -> bool:
        return next(self._uniform) < probability

    def between(self, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``, both included."""
        return low + int(next(self._uniform) * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        return options[int(next(self._uniform) * len(options))]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One of the keys, as often as its share of the weights."""
        rest = next(self._uniform) * sum(weights.values())
        for key, weight in weights.items():
            rest -= weight
            if rest < 0:
                return key
        return key

    def pick_two(self, options: Sequence[T]) -> tuple[T, T]:
        """Two different ones."""
        i, j = self.between(0, len(options) - 1), self.between(0, len(options) - 2)
        return options[i], options[j + (j >= i)]


@dataclass(frozen=True)
class Object:
    """One drawn shape."""

    shape: str
    color: str
    size: str
    x: float
    """Centre, from the left edge."""
    y: float
    """Centre, from the top edge."""
    extent: int
    """Side of the box that the shape fills."""

    @property
    def box(self) -> Box:
        half = self.extent / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """A background and one to four objects that keep clear of each other."""

    background: str
    objects: tuple[Object, ...]


def render(scene: Scene, size: int = CANVAS) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The scene as RGB pixels, antialiased by drawing it four times larger."""
    side = SUPERSAMPLING * size
    image = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for thing in scene.objects:
        left, top, right, bottom = (round(edge * side / CANVAS) for edge in thing.box)
        right, bottom = right - 1, bottom - 1  # Pillow counts the last pixel in
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
    """Whether the object lies inside the border and clear of the others."""
    left, top, right, bottom = thing.box
    if min(left, top) < BORDER or max(right, bottom) > CANVAS - BORDER:
        return False
    for other in others:
        reach = (thing.extent + other.extent) / 2 + GAP
        if abs(thing.x - other.x) < reach and abs(thing.y - other.y) < reach:
            return False
    return True


def _at(thing: Object, corner_x: int, corner_y: int) -> Object:
    return replace(thing, x=corner_x + thing.extent / 2, y=corner_y + thing.extent / 2)


def scatter(things: Sequence[Object], dice: Dice) -> tuple[Object, ...]:
    """Put the objects at random free places; largest first, all over again when stuck."""
    order = sorted(range(len(things)), key=lambda i: -things[i].extent)
    while True:
        placed: dict[int, Object] = {}
        for i in order:
            last = CANVAS - BORDER - things[i].extent
            for _ in range(12):
                thing = _at(things[i], dice.between(BORDER, last), dice.between(BORDER, last))
                if _fits(thing, list(placed.values())):
                    placed[i] = thing
                    break
            else:
                break
        if len(placed) == len(things):
            return tuple(placed[i] for i in range(len(things)))


def arrange(first: Object, where: str, second: Object, dice: Dice) -> tuple[Object, Object]:
    """Put the first object clearly ``where`` of the second: at most half as far off across as along."""
    near, far = (first, second) if where in ("left", "above") else (second, first)
    end = CANVAS - BORDER
    near_along = dice.between(BORDER, end - far.extent - GAP - near.extent)
    far_along = dice.between(near_along + near.extent + GAP, end - far.extent)
    distance = far_along - near_along + (far.extent - near.extent) / 2
    while True:
        near_across = dice.between(BORDER, end - near.extent)
        far_across = dice.between(BORDER, end - far.extent)
        if abs(far_across - near_across + (far.extent - near.extent) / 2) <= distance / 2:
            break
    if where in ("left", "right"):
        near, far = _at(near, near_along, near_across), _at(far, far_along, far_across)
    else:
        near, far = _at(near, near_across, near_along), _at(far, far_across, far_along)
    return (near, far) if where in ("left", "above") else (far, near)


def complete(kind: Kind, large: bool, dice: Dice) -> Object:
    """An object of the kind, not yet placed; what the kind leaves open is random, large only if allowed."""
    size = kind.size or ("large" if large and dice.chance(0.5) else "small")
    color = kind.color or dice.pick(tuple(COLORS))
    return Object(kind.shape or dice.pick(SHAPES), color, size, 0.0, 0.0, dice.between(*SIZES[size]))


def changed(scene: Scene, dice: Dice) -> Scene | None:
    """One random change: to an object, to the number of objects, to the layout or the background."""
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
        thing = complete(Kind(), False, dice)
        last = CANVAS - BORDER - thing.extent
        thing = _at(thing, dice.between(BORDER, last), dice.between(BORDER, last))
        return replace(scene, objects=(*things, thing)) if _fits(thing, things) else None
    if change == "shape":
        thing = replace(things[i], shape=dice.pick(SHAPES))
    elif change == "color":
        thing = replace(things[i], color=dice.pick(tuple(COLORS)))
    else:
        size = dice.pick(tuple(SIZES))
        thing = replace(things[i], size=size, extent=dice.between(*SIZES[size]))
    return replace(scene, objects=(*others, thing)) if _fits(thing, others) else None


def _flipped(things: Sequence[Object], dice: Dice) -> tuple[Object, ...]:
    """The layout mirrored left-right or up-down, or its axes exchanged."""
    flip = dice.pick(("x", "y", "xy"))
    if flip == "x":
        return tuple(replace(thing, x=CANVAS - thing.x) for thing in things)
    if flip == "y":
        return tuple(replace(thing, y=CANVAS - thing.y) for thing in things)
    return tuple(replace(thing, x=thing.y, y=thing.x) for thing in things)
