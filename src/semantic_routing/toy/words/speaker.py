"""English for the world of words: articles, noun phrases and predicates, from the words of a lexicon."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from semantic_routing.toy.claims import Kind
from semantic_routing.toy.scenes import COLORS, SHAPES, SIZES, Dice
from semantic_routing.toy.words.lexicon import Lexicon, plural

ALL_COLORS, ALL_SIZES = tuple(COLORS), tuple(SIZES)
GENERIC = ("shape", "shape", "figure", "object", "thing")
"""Nouns for any shape."""
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
VERBS = ("is", "is", "sits", "lies", "rests", "stands")
"""Verbs before a place."""
_ATTRIBUTIVE = frozenset(("giant", "jumbo", "mini", "mammoth", "whopping", "hulking", "miniature"))
"""Adjectives that only stand before a noun."""
_AN = re.compile(r"(?!eu|uni(?!m|n)|use|one\b)[aeiou]|hour|honest|heir", re.IGNORECASE)
"""Beginnings of words before which the article is "an"."""


def a(noun: str) -> str:
    """Return a noun phrase with its indefinite article."""
    return f"an {noun}" if _AN.match(noun) else f"a {noun}"


def sentence(text: str) -> str:
    """Return a clause as a sentence: with a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


@dataclass(frozen=True)
class Speaker:
    """Builds phrases from the words of a lexicon, with random choices."""

    lexicon: Lexicon
    dice: Dice
    """Chooses words alone, so that other dice say the same in other words."""
    facts: Dice
    """Chooses what is drawn and what is said of it."""

    def shape(self, shape: str | None, count: int = 1) -> str:
        """Name a shape, or any shape for None, in the singular or plural."""
        if shape is None:
            noun = self.dice.pick(GENERIC)
            return noun if count == 1 else plural(noun)
        word = self.lexicon.word("shapes", shape, self.dice)
        return word.text if count == 1 else word.plural

    def size(self, size: str, *, alone: bool = False) -> str:
        """Return an adjective for a size; ``alone`` for one that may follow "is"."""
        while (adjective := self.lexicon.text("sizes", size, self.dice)) in _ATTRIBUTIVE and alone:
            pass
        return adjective

    def adjective(self, color: str) -> str:
        """Return an adjective for a colour; one in four draws a thing, and makes words such as "moss-colored"."""
        if self.dice.chance(0.25):
            thing = self.thing(color)
            if thing.isalpha() and thing.islower():
                return f"{thing}-colored"
        return self.lexicon.text("colors", color, self.dice)

    def thing(self, color: str) -> str:
        """Return a thing of a colour, with its article."""
        return self.lexicon.text("things", color, self.dice)

    def color(self, color: str, *, denied: bool = False) -> str:
        """Return a predicate for a colour, as after "is".

        A ``denied`` one is never "as red as blood": what is not as red as blood may be red.
        """
        if self.dice.chance(0.45):
            return self.adjective(color)
        thing = self.thing(color)
        way = self.dice.between(0, 4)
        if way == 0 and "things" not in self.lexicon.unseen and not denied:
            return f"as {color} as {thing}"
        return ("the color of {}", "the color of {}", "the same color as {}", "colored like {}")[way - 1].format(thing)

    def noun(self, kind: Kind, count: int = 1, *, loose: bool = True, head: str = "") -> str:
        """Name a kind without an article, such as "tiny scarlet coins" or "huge tile the color of moss".

        What follows the noun needs ``loose``: it would be misread where the sentence goes on with "and" or with a
        place. ``head`` is the shape's name if it has been chosen before.
        """
        words = [self.size(kind.size)] if kind.size is not None else []
        head = head or self.shape(kind.shape, count)
        if kind.color is None:
            return " ".join((*words, head))
        way = self.dice.between(0, 9) if loose else 9
        if way < 5:
            after = (
                f"the color of {self.thing(kind.color)}"
                if way < 2
                else f"colored like {self.thing(kind.color)}"
                if way < 3
                else f"that {'is' if count == 1 else 'are'} {self.color(kind.color)}"
            )
            return " ".join((*words, head, after))
        return " ".join((*words, self.adjective(kind.color), head))

    def a(self, kind: Kind, *, loose: bool = True, head: str = "") -> str:
        """Name one object of a kind with an indefinite article."""
        return a(self.noun(kind, loose=loose, head=head))

    def count(self, number: int, noun: str) -> str:
        """Return a number of things, such as "a trio of coins"; ``noun`` is in the plural."""
        return self.lexicon.text("counts", str(number), self.dice).format(noun)

    def place(self, where: str) -> str:
        """Return words for a relation of two objects."""
        return self.lexicon.text("relations", where, self.dice)

    def spot(self, spot: str) -> str:
        """Return words for a place in the picture."""
        return self.lexicon.text("spots", spot, self.dice)

    def setting(self, background: str) -> str:
        """Return words for a background."""
        return self.lexicon.text("settings", background, self.dice)

    def verb(self, place: str) -> str:
        """Return a verb before a place; a participle such as "hovering over" needs "is"."""
        return "is" if is_participle(place) else self.dice.pick(VERBS)

    def maybe_size(self, probability: float = 0.35) -> str | None:
        """Draw a size, or None."""
        sure = "sizes" in self.lexicon.unseen
        return self.facts.pick(ALL_SIZES) if self.facts.chance(1.0 if sure else probability) else None

    def pick(self, templates: Sequence[str], **words: str) -> str:
        """Draw a template and fill in its words."""
        return self.dice.pick(templates).format(**words)

    def two_shapes(self) -> tuple[str, str]:
        """Draw two different shapes."""
        return self.facts.pick_two(SHAPES)

    def two_colors(self) -> tuple[str, str]:
        """Draw two different colours."""
        return self.facts.pick_two(ALL_COLORS)


def is_participle(place: str) -> bool:
    """Return whether a place is said by a participle, such as "hovering over"."""
    return place.split(" ", 1)[0].endswith("ing")


def can_begin(place: str) -> bool:
    """Return whether a place may stand before its object and verb: "below a coin lies a tile"."""
    return not place.endswith(" than") and not is_participle(place)
