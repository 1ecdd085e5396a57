"""Drafts of objects, numbers, colours, places and backgrounds: seven of the toy world's tags, with more words."""

from __future__ import annotations

from dataclasses import replace

from semantic_routing.toy.claims import (
    At,
    Background,
    Count,
    Exists,
    Kind,
    Relation,
    spots,
)
from semantic_routing.toy.scenes import SHAPES
from semantic_routing.toy.words.draft import FRAGMENT, SENTENCE, Draft
from semantic_routing.toy.words.layouts import GROUNDS, populate, relate
from semantic_routing.toy.words.speaker import ALL_COLORS, NUMBERS, Speaker, a, can_begin


def single_object(say: Speaker) -> Draft:
    """One object, at times with its size."""
    kind = Kind(say.facts.pick(SHAPES), size=say.maybe_size(0.5))
    claims, scene = (Exists(kind),), populate((kind,), say.facts)
    if kind.size is not None and say.dice.chance(0.3):
        noun, size = say.shape(kind.shape), say.size(kind.size, alone=True)
        text = say.pick(("the {noun} is {size}", "{a} that is {size}"), noun=noun, size=size, a=a(noun))
        return Draft(text, claims, scene, SENTENCE if text.startswith("the ") else FRAGMENT)
    if say.dice.chance(0.6):
        return Draft(say.a(kind), claims, scene)
    return Draft(say.pick(_ONE, x=say.a(kind)), claims, scene, SENTENCE)


_ONE = (
    "there is {x}",
    "the picture shows {x}",
    "you can see {x}",
    "what you see is {x}",
    "{x} is to be seen",
    "someone has drawn {x}",
    "the artist made {x}",
    "my daughter painted {x}",
    "the page shows {x}",
    "this must be {x}",
)


def two_object(say: Speaker) -> Draft:
    """Two objects of different shapes."""
    first, second = (Kind(shape, size=say.maybe_size()) for shape in say.two_shapes())
    claims, scene = (Exists(first), Exists(second)), populate((first, second), say.facts)
    x, y = say.a(first), say.a(second)
    if say.dice.chance(0.55):
        link = say.dice.pick(("and", "and", "with", "together with", "beside", "next to", "along with", "as well as"))
        return Draft(f"{x} {link} {y}", claims, scene)
    return Draft(say.pick(_TWO, x=x, y=y), claims, scene, SENTENCE)


_TWO = (
    "there is {x}, and there is {y}",
    "{x} keeps {y} company",
    "{x} and {y} share the picture",
    "both {x} and {y} can be seen",
    "you can see {x}, and {y} too",
    "the picture shows {x} as well as {y}",
    "{x} is accompanied by {y}",
    "not only {x} is here, but also {y}",
    "{x} has met {y}",
)


def counting(say: Speaker) -> Draft:
    """An exact number of one shape."""
    kind, count = Kind(say.facts.pick(SHAPES)), say.facts.weighted({2: 0.28, 3: 0.28, 4: 0.26, 5: 0.1, 6: 0.08})
    noun = say.shape(kind.shape, 2)
    claims, scene = (Count(kind, count),), populate((kind,) * count, say.facts)
    if "counts" not in say.lexicon.unseen and say.dice.chance(0.1):
        text = say.pick(
            ("the number of {noun} is {n}", "count the {noun}: the result is {n}"), noun=noun, n=NUMBERS[count]
        )
        return Draft(text, claims, scene, SENTENCE)
    text = say.count(count, noun)
    if say.dice.chance(0.5):
        exactly = "exactly " if text.startswith(NUMBERS[count]) and say.dice.chance(0.3) else ""
        return Draft(exactly + text, claims, scene)
    return Draft(say.pick(_MANY, x=text), claims, scene, SENTENCE)


_MANY = (
    "the picture shows {x}",
    "you can count {x}",
    "someone has drawn {x}",
    "please draw {x}",
    "we need {x}",
    "the artist made {x}",
)


def colors(say: Speaker) -> Draft:
    """One object with its colour."""
    kind = Kind(say.facts.pick(SHAPES), say.facts.pick(ALL_COLORS), say.maybe_size(0.25))
    claims, scene = (Exists(kind),), populate((kind,), say.facts)
    if say.dice.chance(0.45):
        return Draft(say.a(kind), claims, scene)
    if say.dice.chance(0.3):
        return Draft(say.pick(_ONE, x=say.a(kind)), claims, scene, SENTENCE)
    plain, color = say.noun(replace(kind, color=None)), say.color(str(kind.color))
    text = say.pick(_COLORED, x=plain, a=a(plain), color=color)
    return Draft(text, claims, scene, SENTENCE)


_COLORED = (
    "the {x} is {color}",
    "the {x} is {color}",
    "there is {a}, and it is {color}",
    "you can see {a} that is {color}",
    "the {x} has been painted, and now it is {color}",
    "{a} is here, and it is {color}",
)


def position(say: Speaker) -> Draft:
    """Two objects and their relation, or one object and its place in the picture."""
    if say.facts.chance(0.3):
        return _spot(say)
    kinds = tuple(Kind(shape, size=say.maybe_size(0.1)) for shape in say.two_shapes())
    scene, (where,) = relate(kinds, ((0, 1),), say.facts)
    claims = (Relation(kinds[0], where, kinds[1]),)
    x, y = (say.noun(kind, loose=False) for kind in kinds)
    place = say.place(where)
    words = {"x": x, "y": y, "ax": a(x), "ay": a(y), "place": place, "is": say.verb(place)}
    if say.dice.chance(0.5):
        return Draft(say.pick(_BESIDE if can_begin(place) else _BESIDE[:1], **words), claims, scene)
    return Draft(say.pick(_PLACED if can_begin(place) else _PLACED[:3], **words), claims, scene, SENTENCE)


_BESIDE = ("{ax} {place} {ay}", "{ay} with {ax} {place} it", "{ay} that has {ax} {place} it")
_PLACED = (
    "{ax} {is} {place} {ay}",
    "the {x} {is} {place} the {y}",
    "the {x} is to be found {place} the {y}",
    "{place} {ay} {is} {ax}",
    "{place} the {y} there is {ax}",
    "look {place} the {y} to find the {x}",
)


def _spot(say: Speaker) -> Draft:
    kind = Kind(say.facts.pick(SHAPES), size=say.maybe_size(0.15))
    scene = populate((kind,), say.facts)
    spot = say.facts.pick(sorted(spots(scene.objects[0].box), key=len)[-2:])
    x, where = say.noun(kind), say.spot(spot)
    words = {"x": x, "ax": a(x), "spot": where}
    claims = (At(kind, spot),)
    if say.dice.chance(0.4):
        return Draft(f"{a(x)} {where}", claims, scene)
    text = say.pick(("the {x} is {spot}", "{spot} is {ax}", "{spot} you can see {ax}", "{ax} sits {spot}"), **words)
    return Draft(text, claims, scene, SENTENCE)


def color_attr(say: Speaker) -> Draft:
    """Two objects with a colour each."""
    pairs = zip(say.two_shapes(), say.two_colors(), strict=True)
    first, second = (Kind(shape, color, say.maybe_size(0.15)) for shape, color in pairs)
    claims, scene = (Exists(first), Exists(second)), populate((first, second), say.facts)
    if say.dice.chance(0.5):
        link = say.dice.pick(("and", "and", "with", "next to", "together with"))
        return Draft(f"{say.a(first, loose=False)} {link} {say.a(second)}", claims, scene)
    plain = (replace(kind, color=None) for kind in (first, second))
    x, y = (say.noun(kind) for kind in plain)
    p, q = (say.color(str(kind.color)) for kind in (first, second))
    text = say.pick(_ATTRIBUTES, x=x, y=y, ax=a(x), ay=a(y), p=p, q=q)
    return Draft(text, claims, scene, SENTENCE)


_ATTRIBUTES = (
    "the {x} is {p}, and the {y} is {q}",
    "the {x} is {p}, while the {y} is {q}",
    "there is {ax} that is {p}, and there is {ay} that is {q}",
    "{ax} is {p}; {ay} is {q}",
    "unlike the {x}, which is {p}, the {y} is {q}",
    "besides {ax}, which is {p}, there is {ay}, which is {q}",
)


def scene(say: Speaker) -> Draft:
    """One object and the background."""
    kind = Kind(
        say.facts.pick(SHAPES), say.facts.pick(ALL_COLORS) if say.facts.chance(0.5) else None, say.maybe_size(0.15)
    )
    background = say.facts.pick(GROUNDS)
    claims, drawn = (Exists(kind), Background(background)), populate((kind,), say.facts, background)
    x, where = say.noun(kind, loose=False), say.setting(background)
    if say.dice.chance(0.5):
        return Draft(f"{a(x)} {where}", claims, drawn)
    text = say.pick(_SET, x=x, ax=a(x), where=where)
    return Draft(text, claims, drawn, SENTENCE)


_SET = (
    "the {x} is {where}",
    "{where} you can see {ax}",
    "{where}, there is {ax}",
    "someone has left {ax} {where}",
    "imagine {ax} {where}",
    "here comes {ax} {where}",
)
