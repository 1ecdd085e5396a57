"""Scenes of the world of words: objects of given kinds, placed at random or in clear relations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from semantic_routing.toy.claims import Kind
from semantic_routing.toy.scenes import BACKGROUNDS, SHAPES, Dice, Object, Scene, complete, scatter

GROUNDS = tuple(BACKGROUNDS)
TRIPLES = tuple(permutations(SHAPES, 3))
"""Three different shapes in every order."""
FREE_SIZE = 4
"""Most objects among which one of an unmentioned size may be large."""


def populate(kinds: Sequence[Kind], dice: Dice, background: str | None = None) -> Scene:
    """Place one object of each kind; unmentioned attributes are random, but among three or more one may be large."""
    return Scene(background or dice.pick(GROUNDS), scatter(_made(kinds, dice), dice))


def relate(
    kinds: Sequence[Kind], pairs: Sequence[tuple[int, int]], dice: Dice, background: str | None = None
) -> tuple[Scene, list[str]]:
    """Place objects so that each pair is in a clear relation; return the scene and the relations."""
    things = _made(kinds, dice)
    while True:
        placed = scatter(things, dice)
        found = [clear_relation(placed[i], placed[j]) for i, j in pairs]
        held = [where for where in found if where is not None]
        if len(held) == len(pairs):
            return Scene(background or dice.pick(GROUNDS), placed), held


def clear_relation(a: Object, b: Object) -> str | None:
    """Return where the first object clearly is of the second, by the rule of ``scenes.arrange``; None if nowhere."""
    x, y = a.x - b.x, a.y - b.y
    along, across = max(abs(x), abs(y)), min(abs(x), abs(y))
    if along < (a.extent + b.extent) / 2 or across > along / 2:
        return None
    return ("left" if x < 0 else "right") if abs(x) == along else ("above" if y < 0 else "below")


def _made(kinds: Sequence[Kind], dice: Dice) -> list[Object]:
    things: list[Object] = []
    said = any(kind.size == "large" for kind in kinds)
    for kind in kinds:
        free = len(kinds) < 3 or (
            len(kinds) <= FREE_SIZE and not said and all(thing.size == "small" for thing in things)
        )
        things.append(complete(kind, free, dice))
    return things
