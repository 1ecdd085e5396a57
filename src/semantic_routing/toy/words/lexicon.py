"""The words of the world of words: plain lists, each word with its single meaning, and a fixed third held out.

A list is a text file of lines ``word: reading``; lines that begin with ``#`` say what was left out. Readings are the
toy world's own names: ``scarlet: red``, ``coin: circle``. The first word for a reading is its plain name, and is always
used in training. Words that share a part with a meaning, such as ``sugar cube`` and ``ice cube``, are a family: they
are held out together, so no part of a held-out word is ever seen in training.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

from semantic_routing.toy.scenes import Dice

FOLDER = Path(__file__).with_name("lists")
LISTS = ("colors", "things", "shapes", "sizes", "counts", "relations", "spots", "settings")
PLAIN_SHARE = 0.15
"""Share of a reading's plain name among its trained words."""
COMMON = frozenset((FOLDER / "common.txt").read_text(encoding="utf-8").split())
"""Words without a meaning to hold out: they may occur in trained and in held-out words."""


@dataclass(frozen=True)
class Word:
    """One line of a list."""

    text: str
    reading: str
    plural: str = ""
    """Of a shape's name."""


def plural(noun: str) -> str:
    """Return the regular plural of a noun or of a phrase that ends with its noun."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if re.search("[^aeiou]y$", noun) else noun + "s"


@cache
def words(name: str) -> tuple[Word, ...]:
    """Return the words of a list in the order of its file."""
    found = []
    for line in (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        text, _, reading = line.rpartition(": ")
        text, _, many = text.partition(" / ")
        found.append(Word(text, reading, (many or plural(text)) if name == "shapes" else ""))
    return tuple(found)


def parts(text: str) -> set[str]:
    """Return the parts of a word that have a meaning of their own, in lower case and in the singular."""
    found = re.sub(r"'s?\b", " ", text.lower().replace("o'clock", "oclock"))
    pieces = {piece[:-1] if len(piece) > 3 and piece.endswith("s") else piece for piece in re.findall(r"\w+", found)}
    return pieces - COMMON


@cache
def held_out() -> frozenset[tuple[str, str]]:
    """Return (list, text) of the words that training never uses: close to a third of every reading of every list.

    Families are taken in the order of a hash, unless one would take more than a third of a reading.
    """
    everything = [(name, word) for name in LISTS for word in words(name)]
    plain = {(name, word.reading): word for name, word in reversed(everything)}.values()
    size = Counter((name, word.reading) for name, word in everything)
    taken: Counter[tuple[str, str]] = Counter()
    found: set[tuple[str, str]] = set()
    for family in sorted(_families(everything), key=_digest):
        more = Counter((name, word.reading) for name, word in family)
        if any(word in plain or _inside_another(word.text, everything) for _, word in family):
            continue
        if all(taken[reading] + count <= round(size[reading] / 3) for reading, count in more.items()):
            taken += more
            found |= {(name, word.text) for name, word in family}
    return frozenset(found)


def _families(everything: Iterable[tuple[str, Word]]) -> list[list[tuple[str, Word]]]:
    """Group the words that share parts, directly or through others."""
    families: list[tuple[set[str], list[tuple[str, Word]]]] = []
    for name, word in everything:
        own, members = parts(word.text), [(name, word)]
        apart = []
        for other, rest in families:
            if own & other:
                own, members = own | other, rest + members
            else:
                apart.append((other, rest))
        families = [*apart, (own, members)]
    return [members for _, members in families]


def _inside_another(text: str, everything: Iterable[tuple[str, Word]]) -> bool:
    """Return whether a word of common parts alone, such as "right of", is said within another: "to the right of"."""
    return not parts(text) and any(f" {text} " in f" {word.text} " and word.text != text for _, word in everything)


def _digest(family: list[tuple[str, Word]]) -> bytes:
    return blake2b(min(word.text for _, word in family).encode(), digest_size=8).digest()


@cache
def _usable(name: str, unseen: bool) -> Mapping[str, tuple[Word, ...]]:
    """Return the trained or the held-out words of a list by reading."""
    found: defaultdict[str, list[Word]] = defaultdict(list)
    for word in words(name):
        if ((name, word.text) in held_out()) == unseen:
            found[word.reading].append(word)
    return {reading: tuple(some) for reading, some in found.items()}


@dataclass(frozen=True)
class Lexicon:
    """The words that a caption may use."""

    unseen: frozenset[str] = frozenset()
    """Lists of which it uses held-out words only; of the others it uses trained words only."""

    def word(self, name: str, reading: str, dice: Dice) -> Word:
        """Draw a word of a list for a reading."""
        unseen = name in self.unseen
        options = _usable(name, unseen)[reading]
        return options[0] if not unseen and dice.chance(PLAIN_SHARE) else dice.pick(options)

    def text(self, name: str, reading: str, dice: Dice) -> str:
        """Draw the text of a word."""
        return self.word(name, reading, dice).text
