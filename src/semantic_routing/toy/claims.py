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


def _missing(first: Kind, second: Kind, things: Sequence[Thing]) -> str | None:
    return Exists(first).fault(things, "") or Exists(second).fault(things, "")
