"""Claims of captions, and tests of whether they hold for a list of objects and a background.

The same claims apply to the scenes of ``captions.py`` and to the objects that ``checker.py`` finds in pixels: both have
the four attributes of ``Thing``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Protocol, runtime_checkable

Box = tuple[float, float, float, float]
"""Left, top, right, bottom; y points down."""

PLACES = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
"""The four relations and their wordings."""


@runtime_checkable
class Thing(Protocol):
    """Attributes of a drawn or detected object that claims test."""

    @property
    def shape(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def size(self) -> str: ...
    @property
    def box(self) -> Box: ...


def extent(thing: Thing) -> float:
    """Return the longer side of an object's box."""
    left, top, right, bottom = thing.box
    return max(right - left, bottom - top)


def relations(first: Box, second: Box) -> set[str]:
    """Return the first box's relations to the second by GenEval's rule: up to two keys of ``PLACES``.

    Each axis of the centres' offset is shortened by a tenth of the two boxes' summed sides. The remainder must be more
    than half of the unshortened offset's length.
    """
    dx, dy = (first[i] + first[i + 2] - second[i] - second[i + 2] for i in (0, 1))  # twice the offset
    width, height = (first[i + 2] - first[i] + second[i + 2] - second[i] for i in (0, 1))
    half = 0.5 * hypot(dx, dy)
    found = set()
    if abs(dx) - 0.2 * width > half:
        found.add("left" if dx < 0 else "right")
    if abs(dy) - 0.2 * height > half:
        found.add("above" if dy < 0 else "below")
    return found


MIDDLE = 15.5
"""Middle of the grid on which objects are placed, along both axes."""
CLEAR, CORNER = 2.0, 6.0
"""Offsets from the middle beyond which an object is in a half, and in a corner: halfway between places of the grid."""
SPOTS = ("left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right", "middle")
"""Places in the picture."""


def spots(box: Box) -> set[str]:
    """Return the keys of ``SPOTS`` that a box is at: halves and a corner, or the middle."""
    x, y = ((box[i] + box[i + 2]) / 2 - MIDDLE for i in (0, 1))
    across, along = "left" if x < 0 else "right", "top" if y < 0 else "bottom"
    found = {name for name, offset in ((across, x), (along, y)) if abs(offset) > CLEAR}
    if min(abs(x), abs(y)) > CORNER:
        found.add(f"{along} {across}")
    return found | ({"middle"} if max(abs(x), abs(y)) < CORNER else set())


@dataclass(frozen=True)
class Kind:
    """Objects with some common attributes; None matches any value."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None

    def matches(self, thing: Thing) -> bool:
        return (
            self.shape in (None, thing.shape) and self.color in (None, thing.color) and self.size in (None, thing.size)
        )

    def among(self, things: Sequence[Thing]) -> list[Thing]:
        return [thing for thing in things if self.matches(thing)]

    def words(self, count: int = 1) -> str:
        """The kind in English, such as ``small red crosses``."""
        noun = self.shape or "shape"
        if count != 1:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join(word for word in (self.size, self.color, noun) if word)


@runtime_checkable
class Claim(Protocol):
    """One thing that a caption says of its picture."""

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        """Return why the claim does not hold, as a short sentence; None if it holds."""


@dataclass(frozen=True)
class Exists:
    """There is at least one object of the kind."""

    kind: Kind

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        return None if self.kind.among(things) else f"found no {self.kind.words()}"


@dataclass(frozen=True)
class Absent:
    """There is no object of the kind."""

    kind: Kind

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        return f"found a {self.kind.words()}, wanted none" if self.kind.among(things) else None


@dataclass(frozen=True)
class Count:
    """There are exactly ``count`` objects of the kind."""

    kind: Kind
    count: int

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        found = len(self.kind.among(things))
        return None if found == self.count else f"found {found} {self.kind.words(found)}, wanted {self.count}"


@dataclass(frozen=True)
class Every:
    """There are objects, and all of them are of the kind."""

    kind: Kind

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        if not things:
            return "found no objects"
        for thing in things:
            if not self.kind.matches(thing):
                return f"found a {thing.color} {thing.shape}, wanted only {self.kind.words(2)}"
        return None


@dataclass(frozen=True)
class Background:
    """The background has this colour."""

    color: str

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        return None if background == self.color else f"the background is {background}, wanted {self.color}"


@dataclass(frozen=True)
class Relation:
    """Some ``first`` is ``where`` (a key of ``PLACES``) of some ``second``."""

    first: Kind
    where: str
    second: Kind

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        firsts, seconds = self.first.among(things), self.second.among(things)
        if any(self.where in relations(a.box, b.box) for a in firsts for b in seconds):
            return None
        relation = f"{PLACES[self.where][0]} the {self.second.words()}"
        return _missing(self.first, self.second, things) or f"the {self.first.words()} is not {relation}"


@dataclass(frozen=True)
class MoreThan:
    """There are more of ``first`` than of ``second``, and some of both."""

    first: Kind
    second: Kind

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        more, fewer = len(self.first.among(things)), len(self.second.among(things))
        if more > fewer > 0:
            return None
        found = f"found {more} {self.first.words(more)} and {fewer} {self.second.words(fewer)}"
        return _missing(self.first, self.second, things) or f"{found}, wanted more {self.first.words(2)}"


@dataclass(frozen=True)
class LargerThan:
    """Some ``first`` is clearly larger than some ``second``: its box is a fifth longer."""

    first: Kind
    second: Kind

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        firsts, seconds = self.first.among(things), self.second.among(things)
        if any(extent(a) > 1.2 * extent(b) for a in firsts for b in seconds):
            return None
        relation = f"is not larger than the {self.second.words()}"
        return _missing(self.first, self.second, things) or f"the {self.first.words()} {relation}"


@dataclass(frozen=True)
class At:
    """Some object of the kind is at ``spot`` (one of ``SPOTS``)."""

    kind: Kind
    spot: str

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        found = self.kind.among(things)
        if any(self.spot in spots(thing.box) for thing in found):
            return None
        return f"the {self.kind.words()} is not at the {self.spot}" if found else f"found no {self.kind.words()}"


@dataclass(frozen=True)
class AllOf:
    """There are objects of the kind ``every``, and all of them are of the kind ``kind``."""

    every: Kind
    kind: Kind

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        found = self.every.among(things)
        if not found:
            return f"found no {self.every.words()}"
        wrong = len(found) - len(self.kind.among(found))
        return f"{wrong} of {len(found)} {self.every.words(2)} are not {self.kind.words(2)}" if wrong else None


@dataclass(frozen=True)
class Balance:
    """There are both kinds, and of ``first`` there are ``times`` as many as of ``second``, plus ``more``."""

    first: Kind
    second: Kind
    times: int = 1
    more: int = 0

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        first, second = len(self.first.among(things)), len(self.second.among(things))
        wanted = self.times * second + self.more
        if first == wanted and second:
            return None
        found = f"found {first} {self.first.words(first)} and {second} {self.second.words(second)}"
        return _missing(self.first, self.second, things) or f"{found}, wanted {wanted} {self.first.words(wanted)}"


@dataclass(frozen=True)
class Together:
    """There are both kinds, and exactly ``count`` objects of the two in all."""

    first: Kind
    second: Kind
    count: int

    def fault(self, things: Sequence[Thing], background: str) -> str | None:
        found = len(self.first.among(things)) + len(self.second.among(things))
        kinds = f"{self.first.words(2)} and {self.second.words(2)}"
        wrong = f"found {found} {kinds} together, wanted {self.count}" if found != self.count else None
        return _missing(self.first, self.second, things) or wrong


def _missing(first: Kind, second: Kind, things: Sequence[Thing]) -> str | None:
    return Exists(first).fault(things, "") or Exists(second).fault(things, "")
