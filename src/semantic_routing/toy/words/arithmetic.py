"""Drafts of sums, differences and multiples."""

from __future__ import annotations

from semantic_routing.toy.claims import (
    Balance,
    Count,
    Kind,
    Together,
)
from semantic_routing.toy.scenes import SHAPES
from semantic_routing.toy.words.draft import FRAGMENT, SENTENCE, Draft
from semantic_routing.toy.words.layouts import populate
from semantic_routing.toy.words.speaker import NUMBERS, Speaker, a


def arithmetic(say: Speaker) -> Draft:
    """Sums, differences and multiples."""
    return say.facts.pick((_difference, _difference, _multiple, _total, _sum, _parts))(say)


def _difference(say: Speaker) -> Draft:
    first, second = (Kind(shape) for shape in say.two_shapes())
    fewer = say.facts.between(1, 2)
    more = say.facts.between(0, 3) if fewer == 1 else say.facts.between(0, 2)
    words = {"x": say.shape(first.shape, 2), "y": say.shape(second.shape, 2), "n": NUMBERS[max(more, 1)]}
    templates = (_EQUAL, _ONE_MORE, _MORE, _MORE)[more]
    text = say.pick(templates, **words, one=say.shape(first.shape), other=say.shape(second.shape))
    form = SENTENCE if text.startswith(("there", "the ", "for every")) else FRAGMENT
    kinds = (first,) * (fewer + more) + (second,) * fewer
    return Draft(text, (Balance(first, second, 1, more),), populate(kinds, say.facts), form)


_EQUAL = (
    "as many {x} as {y}",
    "an equal number of {x} and {y}",
    "there are just as many {x} as {y}",
    "for every {one} there is one {other}",
)
_ONE_MORE = (
    "one more {one} than there are {y}",
    "one {other} fewer than there are {x}",
    "the {x} outnumber the {y} by one",
)
_MORE = (
    "{n} more {x} than {y}",
    "{n} fewer {y} than {x}",
    "there are {n} more {x} than {y}",
    "the {x} outnumber the {y} by {n}",
)


def _multiple(say: Speaker) -> Draft:
    first, second = (Kind(shape) for shape in say.two_shapes())
    fewer = say.facts.between(1, 2)
    times = say.facts.between(2, 3) if fewer == 1 else 2
    x, y = say.shape(first.shape, 2), say.shape(second.shape, 2)
    templates = ("twice as many {x} as {y}", "half as many {y} as {x}", "there are two {x} for every {one}")
    if times == 3:
        templates = (
            "three times as many {x} as {y}",
            "a third as many {y} as {x}",
            "there are three {x} for every {one}",
        )
    text = say.pick(templates, x=x, y=y, one=say.shape(second.shape))
    form = SENTENCE if text.startswith("there") else FRAGMENT
    kinds = (first,) * (times * fewer) + (second,) * fewer
    return Draft(text, (Balance(first, second, times),), populate(kinds, say.facts), form)


def _total(say: Speaker) -> Draft:
    kind = Kind(say.facts.pick(SHAPES))
    one, two = say.facts.between(1, 2), say.facts.between(1, 2)
    down = say.facts.chance(0.3)
    number = one + two if not down else one
    x, generic = say.shape(kind.shape, 2 if (one > 1 or down) else 1), NUMBERS
    if down:
        text = say.pick(
            ("{n} {x} minus {m}", "{n} {x}, {m} of which {have} been taken away", "{n} {x} without {m} of them"),
            n=generic[one + two], m=generic[two], x=x, have="has" if two == 1 else "have",
        )  # fmt: skip
    else:
        text = say.pick(
            ("{n} {x} plus {m} more", "{n} {x} and then another {m}", "{n} {x} and {m} more of the same kind"),
            n=generic[one], m=generic[two], x=x,
        )  # fmt: skip
    return Draft(text, (Count(kind, number),), populate((kind,) * number, say.facts))


def _sum(say: Speaker) -> Draft:
    first, second = (Kind(shape) for shape in say.two_shapes())
    one, two = say.facts.between(1, 3), say.facts.between(1, 2)
    x, y = say.shape(first.shape, 2), say.shape(second.shape, 2)
    text = say.pick(
        (
            "the number of {x} plus the number of {y} is {n}",
            "adding the number of {x} to that of {y} gives {n}",
            "count the {x}, then count the {y}: the sum is {n}",
            "the number of {x} and the number of {y} add up to {n}",
        ),
        x=x, y=y, n=NUMBERS[one + two],
    )  # fmt: skip
    kinds = (first,) * one + (second,) * two
    return Draft(text, (Together(first, second, one + two),), populate(kinds, say.facts), SENTENCE)


def _parts(say: Speaker) -> Draft:
    number = say.facts.between(3, 5)
    some = say.facts.between(1, number - 1)
    kind, generic = Kind(say.facts.pick(SHAPES)), say.shape(None, 2)
    rest = [Kind(say.facts.pick([shape for shape in SHAPES if shape != kind.shape])) for _ in range(number - some)]
    x = say.shape(kind.shape, some)
    words = {"n": NUMBERS[number], "m": NUMBERS[some], "x": x if some > 1 else a(x), "all": generic}
    are = "are" if some > 1 else "is"
    text = say.pick(
        (
            "of the {n} {all}, {m} {are} {x}",
            "there are {n} {all}, {m} of which {are} {x}",
            "{n} {all} in total, of which {m} {are} {x}",
        ),
        are=are, **words,
    )  # fmt: skip
    claims = (Count(Kind(), number), Count(kind, some))
    form = FRAGMENT if text.startswith(NUMBERS[number]) else SENTENCE
    return Draft(text, claims, populate((*(kind,) * some, *rest), say.facts), form)
