"""Drafts of comparisons, differences, negation and quantifiers: four of the toy world's tags, with more words."""

from __future__ import annotations

from dataclasses import replace

from semantic_routing.toy.claims import (
    Absent,
    AllOf,
    Claim,
    Count,
    Every,
    Exists,
    Kind,
    LargerThan,
    MoreThan,
)
from semantic_routing.toy.scenes import SHAPES
from semantic_routing.toy.words.draft import FRAGMENT, SENTENCE, Draft
from semantic_routing.toy.words.layouts import populate
from semantic_routing.toy.words.lexicon import plural
from semantic_routing.toy.words.speaker import ALL_COLORS, ALL_SIZES, NUMBERS, Speaker, a


def comparison(say: Speaker) -> Draft:
    """Numbers or sizes compared."""
    if say.facts.chance(0.5):
        more, fewer = (Kind(shape) for shape in say.two_shapes())
        number = say.facts.between(2, 4)
        kinds = (more,) * number + (fewer,) * say.facts.between(1, min(number - 1, 2))
        text = say.pick(_NUMEROUS, x=say.shape(more.shape, 2), y=say.shape(fewer.shape, 2))
        form = FRAGMENT if text.startswith(("more", "fewer")) else SENTENCE
        return Draft(text, (MoreThan(more, fewer),), populate(kinds, say.facts), form)
    if say.facts.chance(0.6):
        large, small = (Kind(shape) for shape in say.two_shapes())
        x, y = (say.noun(kind) for kind in (large, small))
    else:
        shape = say.facts.pick(SHAPES)
        large, small = (Kind(shape, color) for color in say.two_colors())
        x, y = say.noun(large, loose=False), say.noun(Kind(None, small.color), loose=False, head="one")
    kinds = (replace(large, size="large"), replace(small, size="small"))
    text = say.pick(_LARGER, x=x, y=y)
    return Draft(text, (LargerThan(large, small),), populate(kinds, say.facts), SENTENCE)


_NUMEROUS = (
    "more {x} than {y}",
    "fewer {y} than {x}",
    "the {x} outnumber the {y}",
    "the {y} are outnumbered by the {x}",
    "there are more {x} than {y}",
    "there are not as many {y} as {x}",
    "{y} are rarer here than {x}",
)
_LARGER = (
    "the {x} is larger than the {y}",
    "the {x} is bigger than the {y}",
    "the {x} dwarfs the {y}",
    "the {x} takes more room than the {y}",
    "the {x} exceeds the {y} in size",
    "the {x} outsizes the {y}",
    "the size of the {x} surpasses that of the {y}",
)


def differentiation(say: Speaker) -> Draft:
    """Two objects of one shape that differ, or three of which one differs."""
    shape = say.facts.pick(SHAPES)
    by_size = say.facts.chance(0.25)
    values = say.facts.pick_two(ALL_SIZES) if by_size else say.two_colors()
    first, second = (Kind(shape, size=value) if by_size else Kind(shape, value) for value in values)
    p, q = (say.size(value, alone=True) if by_size else say.color(value) for value in values)
    noun = say.shape(shape, 2)
    if not by_size and say.facts.chance(0.2):
        claims: tuple[Claim, ...] = (Count(Kind(shape), 3), Count(first, 2), Count(second, 1))
        text = say.pick(_ODD_ONE_OUT, x=noun, p=p, q=q)
        return Draft(text, claims, populate((first, first, second), say.facts), SENTENCE)
    claims = (Count(Kind(shape), 2), Exists(first), Exists(second))
    scene = populate((first, second), say.facts)
    text = say.pick(_APART, x=noun, two=say.count(2, noun) if say.dice.chance(0.5) else f"two {noun}", p=p, q=q)
    return Draft(text, claims, scene, FRAGMENT if ", one " in text or ": one " in text else SENTENCE)


_APART = (
    "{two}, one {p} and one {q}",
    "{two}, one {p} and the other {q}",
    "{two}: one {p}, the other {q}",
    "of the two {x} one is {p} and the other is {q}",
    "there are two {x}, of which one is {p} and one is {q}",
    "one of the two {x} is {p}, but its twin is {q}",
)
_ODD_ONE_OUT = (
    "of the three {x} two are {p} and one is {q}",
    "there are three {x}, two of which are {p}, while the third is {q}",
    "two of the three {x} are {p}; the remaining one is {q}",
)


def negation(say: Speaker) -> Draft:
    """Something that is there, and something that is not."""
    if say.facts.chance(0.5):
        there, absent = (Kind(shape) for shape in say.two_shapes())
        x, y = say.a(there), say.shape(absent.shape)
        text = say.pick(_WITHOUT, x=x, y=y, ay=a(y))
        form = SENTENCE if text.startswith(("there", "you", "the ", "what")) else FRAGMENT
        return Draft(text, (Exists(there), Absent(absent)), populate((there,), say.facts), form)
    if say.facts.chance(0.35):
        i, j = say.two_shapes()
        there = Kind(say.facts.pick([shape for shape in SHAPES if shape not in (i, j)]))
        neither = "neither {x} nor {y}, but {z}", "{z} instead of {x} or {y}", "{z}, and neither {x} nor {y}"
        text = say.pick(neither, x=say.a(Kind(i)), y=say.a(Kind(j)), z=say.a(there))
        return Draft(text, (Absent(Kind(i)), Absent(Kind(j)), Exists(there)), populate((there,), say.facts))
    shape = say.facts.pick(SHAPES)
    color, other = say.two_colors()
    noun = say.shape(shape)
    text = say.pick(_UNLIKE, x=noun, ax=a(noun), color=say.color(color, denied=True))
    form = SENTENCE if text.startswith(("the ", "whatever")) else FRAGMENT
    return Draft(
        text, (Exists(Kind(shape)), Absent(Kind(shape, color))), populate((Kind(shape, other),), say.facts), form
    )


_WITHOUT = (
    "{x} but no {y}",
    "{x} without {ay}",
    "{x}, but not {ay}",
    "{x} and not a single {y}",
    "{x}, with no {y} in sight",
    "there is {x}, but there is no {y}",
    "you can see {x}, but you cannot see {ay}",
    "the picture has {x} and lacks {ay}",
    "what is missing beside {x} is {ay}",
)
_UNLIKE = (
    "{ax} that is not {color}",
    "{ax} that is anything but {color}",
    "the {x} is not {color}",
    "{ax} which is by no means {color}",
    "whatever color the {x} has, it is not {color}",
)


def universal(say: Speaker) -> Draft:
    """Quantifiers: all, every, only, both, all but one."""
    way, color = say.facts.between(0, 5), say.facts.pick(ALL_COLORS)
    if way == 0:
        kind = Kind(say.facts.pick(SHAPES), color if say.facts.chance(0.4) else None)
        text = say.pick(("only {x}", "nothing but {x}", "nothing except {x}"), x=say.noun(kind, 2))
        return Draft(text, (Every(kind),), populate((kind,) * say.facts.between(2, 4), say.facts))
    if way == 1:
        i, j = say.two_shapes()
        every, rest, other = Kind(i), Kind(j), say.facts.pick([c for c in ALL_COLORS if c != color])
        words = {"x": say.shape(i), "xs": say.shape(i, 2), "y": say.shape(j)}
        text = say.pick(_SOME, **words, p=say.color(color), q=say.color(other))
        kinds = (Kind(i, color),) * say.facts.between(2, 3) + (Kind(j, other),)
        claims: tuple[Claim, ...] = (AllOf(every, Kind(color=color)), Exists(replace(rest, color=other)))
        return Draft(text, claims, populate(kinds, say.facts), SENTENCE)
    if way == 2:
        shape = say.facts.pick(SHAPES)
        text = say.pick(("both {x} are {p}", "the two {x} are both {p}"), x=say.shape(shape, 2), p=say.color(color))
        kind = Kind(shape, color)
        return Draft(text, (Count(Kind(shape), 2), Count(kind, 2)), populate((kind, kind), say.facts), SENTENCE)
    if way == 3:
        number, other = say.facts.between(3, 4), say.facts.pick([c for c in ALL_COLORS if c != color])
        text = say.pick(_ALL_BUT, x=say.shape(None, 2), n=NUMBERS[number], p=say.color(color, denied=True))
        kinds = (Kind(color=color),) * (number - 1) + (Kind(color=other),)
        claims = (Count(Kind(), number), Count(Kind(color=color), number - 1))
        return Draft(text, claims, populate(kinds, say.facts), SENTENCE)
    kind = Kind(say.facts.pick(SHAPES) if say.facts.chance(0.4) else None, color)
    noun = say.shape(None)
    p = say.color(color, denied=True) if kind.shape is None else say.a(kind)
    text = say.pick(_EVERY, x=noun, xs=plural(noun), p=p)
    if kind.shape is None and say.dice.chance(0.3):
        text = say.pick(
            ("all {x} are {p}", "all of the {x} are {p}", "the {x} are {p}, all of them"), x=plural(noun), p=p
        )
    return Draft(text, (Every(kind),), populate((kind,) * say.facts.between(2, 4), say.facts), SENTENCE)


_SOME = (
    "every {x} is {p}, but the {y} is {q}",
    "each {x} is {p}, while the {y} is {q}",
    "the {y} is {q}, and all of the {xs} are {p}",
)
_ALL_BUT = (
    "all but one of the {n} {x} are {p}",
    "of the {n} {x} only one is not {p}",
    "with one exception the {n} {x} are {p}",
)
_EVERY = (
    "every {x} is {p}",
    "each {x} is {p}",
    "each and every {x} is {p}",
    "among the {xs} there is none that is not {p}",
    "without exception every {x} is {p}",
    "whichever {x} you choose, it is {p}",
    "any {x} that you can find is {p}",
)
