"""Drafts that name an object once and then refer to it by a pronoun, by "the other" or by "the latter"."""

from __future__ import annotations

from dataclasses import replace

from semantic_routing.toy.claims import (
    Count,
    Exists,
    Kind,
    Relation,
)
from semantic_routing.toy.scenes import SHAPES
from semantic_routing.toy.words.draft import SENTENCE, WHOLE, Draft, Drafting
from semantic_routing.toy.words.layouts import TRIPLES, populate, relate
from semantic_routing.toy.words.speaker import ALL_COLORS, Speaker, a, can_begin

_SIDE = {"left": "left", "right": "right", "above": "upper", "below": "lower"}
"""Adjectives for the first object of a relation."""


def reference(say: Speaker) -> Draft:
    """Objects that are named once and then meant by "one", "the other", "the latter", "it" or "which"."""
    return say.facts.pick(_REFERENCES)(say)


def _other(say: Speaker) -> Draft:
    shape, (color, other) = say.facts.pick(SHAPES), say.two_colors()
    noun, p, q = say.shape(shape, 2), say.color(color), say.color(other)
    text = say.pick(
        (
            "There are two {x}. One is {p}; the other one is {q}.",
            "Two {x} are here. One of them is {p}. The other is {q}.",
            "Look at the two {x}: the first of them is {p}, but not the other, which is {q}.",
            "The picture shows two {x}. While the first one is {p}, the second one is {q}.",
        ),
        x=noun, p=p, q=q,
    )  # fmt: skip
    first, second = Kind(shape, color), Kind(shape, other)
    claims = (Count(Kind(shape), 2), Exists(first), Exists(second))
    return Draft(text, claims, populate((first, second), say.facts), WHOLE)


def _former(say: Speaker) -> Draft:
    pairs = zip(say.two_shapes(), say.two_colors(), strict=True)
    first, second = (Kind(shape, color, say.maybe_size(0.3)) for shape, color in pairs)
    x, y = (say.a(replace(kind, color=None)) for kind in (first, second))
    words = {"x": x, "y": y, "p": say.color(str(first.color)), "q": say.color(str(second.color))}
    text = say.pick(
        (
            "there is {x} and {y}; the former is {p}, the latter {q}",
            "of {x} and {y} the latter is {q} and the former {p}",
            "you can see {x}, which is {p}, and {y}, which is {q}",
        ),
        **words,
    )
    return Draft(text, (Exists(first), Exists(second)), populate((first, second), say.facts), SENTENCE)


def _lower_one(say: Speaker) -> Draft:
    shapes, color = say.two_shapes(), say.facts.pick(ALL_COLORS)
    kinds = (Kind(shapes[0], color), Kind(shapes[1]))
    scene, (where,) = relate(kinds, ((0, 1),), say.facts)
    x, y, place = say.shape(shapes[0]), say.shape(shapes[1]), say.place(where)
    words = {"x": a(x), "y": a(y), "place": place, "is": say.verb(place), "side": _SIDE[where], "p": say.color(color)}
    text = say.pick(
        ("{x} {is} {place} {y}; the {side} one is {p}", "{x} {is} {place} {y}, and of the two the {side} one is {p}"),
        **words,
    )
    return Draft(text, (Relation(kinds[0], where, kinds[1]),), scene, SENTENCE)


def _two_alike(say: Speaker) -> Draft:
    shape = say.facts.pick(SHAPES)
    kinds = tuple(Kind(shape, color) for color in say.two_colors())
    scene, (where,) = relate(kinds, ((0, 1),), say.facts)
    opposite = {"left": "right", "right": "left", "above": "lower", "below": "upper"}[where]
    words = {"x": say.shape(shape, 2), "p": say.color(str(kinds[0].color)), "q": say.color(str(kinds[1].color))}
    text = say.pick(
        (
            "of the two {x} the {side} one is {p}, and the {opposite} one is {q}",
            "there are two {x}; the {side} one is {p}, the {opposite} one is {q}",
            "two {x} are shown, of which the {opposite} one is {q}; the other one is {p}",
        ),
        side=_SIDE[where], opposite=opposite, **words,
    )  # fmt: skip
    return Draft(text, (Count(Kind(shape), 2), Relation(kinds[0], where, kinds[1])), scene, SENTENCE)


def _it_lies(say: Speaker) -> Draft:
    shapes, color = say.two_shapes(), say.facts.pick(ALL_COLORS)
    kinds = (Kind(shapes[0], color), Kind(shapes[1], size=say.maybe_size(0.3)))
    scene, (where,) = relate(kinds, ((0, 1),), say.facts)
    y, place = say.noun(kinds[1]), say.place(where)
    x = say.a(kinds[0])
    words = {"x": x, "y": y, "ay": a(y), "place": place, "is": say.verb(place)}
    templates = ["There is {ay}. {x} {is} {place} it.", "Can you see the {y}? {x} {is} {place} it."]
    if can_begin(place):
        templates += ["There is {ay}, and {place} it {is} {x}.", "Here is {ay}. {place} it {is} {x}."]
    return Draft(_capitals(say.pick(templates, **words)), (Relation(kinds[0], where, kinds[1]),), scene, WHOLE)


def _same_color(say: Speaker) -> Draft:
    color = say.facts.pick(ALL_COLORS)
    first, second = (Kind(shape, color) for shape in say.two_shapes())
    x, y = say.shape(first.shape), say.shape(second.shape)
    text = say.pick(
        (
            "the {x} has the same color as the {y}, which is {p}",
            "the {y} is {p}, and so is the {x}",
            "if you know that the {y} is {p}, you know the color of the {x}: it is the same",
            "the {x} and the {y} do not differ in color: the latter is {p}",
        ),
        x=x, y=y, p=say.color(color),
    )  # fmt: skip
    return Draft(text, (Exists(first), Exists(second)), populate((first, second), say.facts), SENTENCE)


def _bigger_one(say: Speaker) -> Draft:
    shape, colors = say.facts.pick(SHAPES), say.two_colors()
    large, small = (Kind(shape, color, size) for color, size in zip(colors, ("large", "small"), strict=True))
    text = say.pick(
        (
            "of the two {x} the bigger one is {p} and the smaller one is {q}",
            "there are two {x}, and the smaller of them is {q}, whereas the larger is {p}",
            "the bigger of the two {x} is {p}; the other one is {q}",
        ),
        x=say.shape(shape, 2), p=say.color(colors[0]), q=say.color(colors[1]),
    )  # fmt: skip
    claims = (Count(Kind(shape), 2), Exists(large), Exists(small))
    return Draft(text, claims, populate((large, small), say.facts), SENTENCE)


def _another(say: Speaker) -> Draft:
    shape = say.facts.pick(SHAPES)
    first, second = (Kind(shape, color) for color in say.two_colors())
    words = {"x": a(say.shape(shape)), "p": say.color(str(first.color)), "q": say.color(str(second.color))}
    text = say.pick(
        ("{x} is {p}. Another one is {q}.", "There is {x} that is {p}. Next to it is another, but that one is {q}."),
        **words,
    )
    return Draft(_capitals(text), (Exists(first), Exists(second)), populate((first, second), say.facts), WHOLE)


def _chain(say: Speaker) -> Draft:
    shapes = say.facts.pick(TRIPLES)
    kinds = tuple(
        Kind(shape, color) for shape, color in zip(shapes, (None, say.facts.pick(ALL_COLORS), None), strict=True)
    )
    scene, held = relate(kinds, ((0, 1), (1, 2)), say.facts)
    x, y, z = (say.a(kind, loose=False) for kind in kinds)
    places = [say.place(where) for where in held]
    words = {"x": x, "y": y, "z": z, "is": say.verb(places[0]), "are": say.verb(places[1])}
    text = say.pick(
        (
            "{x} {is} {one} {y}, which {are} {two} {z}",
            "{x} {is} {one} {y}, and the latter {are} {two} {z}",
            "there is {y} that {are} {two} {z}; {one} the former, there is {x}"
            if can_begin(places[0])
            else "{x} {is} {one} {y}, which {are} {two} {z}",
        ),
        one=places[0], two=places[1], **words,
    )  # fmt: skip
    claims = (Relation(kinds[0], held[0], kinds[1]), Relation(kinds[1], held[1], kinds[2]))
    return Draft(text, claims, scene, SENTENCE)


_REFERENCES: tuple[Drafting, ...] = (
    _other, _former, _lower_one, _two_alike, _it_lies, _it_lies, _same_color, _bigger_one, _another, _chain,
)  # fmt: skip


def _capitals(text: str) -> str:
    """Capitalise the first letter of every sentence."""
    parts = text.replace("? ", "?\n").replace(". ", ".\n").split("\n")
    return " ".join(part[0].upper() + part[1:] for part in parts)
