"""Claims of prompts that a person types: captions of the toy world, read back by their grammar.

``captions.py`` makes captions from claims; this is the way back. A prompt that the grammar does not hold has no claims,
and its picture cannot be judged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from semantic_routing.toy.captions import NUMBERS, OPENINGS, SETTINGS
from semantic_routing.toy.claims import (
    PLACES,
    Absent,
    Background,
    Claim,
    Count,
    Every,
    Exists,
    Kind,
    LargerThan,
    MoreThan,
    Relation,
)
from semantic_routing.toy.scenes import COLORS, SHAPES, SIZES

Groups = dict[str, str]
"""The words of a phrase, by the names of their groups."""


def parse_claims(prompt: str) -> tuple[Claim, ...] | None:
    """Return what a prompt claims of its picture; None if it is not a sentence of the toy world.

    Capitals, spaces and a full stop at the end do not matter, and any phrase may end in a setting ("in the snow").
    """
    text = " ".join(prompt.lower().split()).rstrip(".").strip()
    for opening in sorted({opening for group in OPENINGS.values() for opening in group}, key=len, reverse=True):
        if text.startswith(opening) and (found := _phrase(text.removeprefix(opening))) is not None:
            return found
    return None


def _phrase(text: str) -> tuple[Claim, ...] | None:
    """Return the claims of a phrase without its opening."""
    if (found := _without_setting(text)) is not None:
        return found
    for color, settings in SETTINGS.items():
        for setting in settings:
            if text.endswith(f" {setting}") and (found := _without_setting(text.removesuffix(f" {setting}"))):
                return (*found, Background(color))
    return None


def _without_setting(text: str) -> tuple[Claim, ...] | None:
    for pattern, claims in _PHRASES:
        if found := pattern.fullmatch(text):
            return claims({name: word for name, word in found.groupdict().items() if word})
    return None


def _kind(words: Groups, which: str = "") -> Kind:
    shape = words.get(f"shape{which}")
    return Kind(shape and _SHAPE_OF[shape], words.get(f"color{which}"), words.get(f"size{which}"))


def _any(words: Iterable[str]) -> str:
    """Return a pattern for any of some words, the longest first."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


def _noun(which: str = "", *, count: int = 1) -> str:
    """Return a pattern for one or several objects of a kind, such as "small red crosses"."""
    shapes = _any(Kind(shape).words(count) for shape in SHAPES)
    return f"(?:(?P<size{which}>{_any(SIZES)}) )?(?:(?P<color{which}>{_COLOR}) )?(?P<shape{which}>{shapes})"


def _one(which: str = "") -> str:
    return f"(?:a|an|one|the) {_noun(which)}"


def _both(words: Groups) -> tuple[Claim, ...]:
    return Exists(_kind(words, "1")), Exists(_kind(words, "2"))


def _count(words: Groups) -> tuple[Claim, ...]:
    return (Count(_kind(words), _COUNTS[words["count"]]),)


def _placed(words: Groups) -> tuple[Claim, ...]:
    where = next(name for name, wordings in PLACES.items() if words["place"] in wordings)
    return (Relation(_kind(words, "1"), where, _kind(words, "2")),)


def _more(words: Groups) -> tuple[Claim, ...]:
    first, second = _kind(words, "1"), _kind(words, "2")
    return (MoreThan(first, second) if words["than"] == "more" else MoreThan(second, first),)


def _larger(words: Groups) -> tuple[Claim, ...]:
    first, second = _kind(words, "1"), _kind(words, "2")
    return (LargerThan(first, second) if words["than"] in ("larger", "bigger") else LargerThan(second, first),)


def _alike(words: Groups) -> tuple[Claim, ...]:
    shape = _SHAPE_OF[words["shape"]]
    return Count(Kind(shape), 2), Exists(_told(shape, words["word1"])), Exists(_told(shape, words["word2"]))


def _told(shape: str, word: str) -> Kind:
    return Kind(shape, color=word) if word in COLORS else Kind(shape, size=word)


def _lacks(words: Groups) -> tuple[Claim, ...]:
    return Exists(_kind(words, "1")), Absent(_kind(words, "2"))


def _not_colored(words: Groups) -> tuple[Claim, ...]:
    return Exists(_kind(words)), Absent(Kind(words["shape"], words["not"]))


def _every(words: Groups) -> tuple[Claim, ...]:
    return (Every(_kind(words)),)


_COUNTS = {word: count for count, word in NUMBERS.items()} | {str(count): count for count in NUMBERS}
_SHAPE_OF = {Kind(shape).words(count): shape for shape in SHAPES for count in (1, 2)}
_COLOR, _WORD = _any(COLORS), _any([*COLORS, *SIZES])
_PLACE = _any([wording for wordings in PLACES.values() for wording in wordings])
_PHRASES: tuple[tuple[re.Pattern[str], Callable[[Groups], tuple[Claim, ...]]], ...] = tuple(
    (re.compile(pattern), claims)
    for pattern, claims in (
        (_one(), lambda words: (Exists(_kind(words)),)),
        (f"(?:a|an|one|the) (?:(?P<size>{_any(SIZES)}) )?(?P<shape>{_any(SHAPES)}) that is (?P<color>{_COLOR})",
         lambda words: (Exists(_kind(words)),)),
        (f"{_one('1')} (?:and|with|together with|beside) {_one('2')}", _both),
        (f"(?:exactly )?(?P<count>{_any(_COUNTS)}) {_noun(count=2)}", _count),
        (f"{_one('1')} (?:is )?(?P<place>{_PLACE}) {_one('2')}", _placed),
        (f"(?P<than>more|fewer) {_noun('1', count=2)} than {_noun('2', count=2)}", _more),
        (f"{_one('1')} is (?P<than>larger|bigger|smaller|tinier) than {_one('2')}", _larger),
        (f"two {_noun(count=2)}, one (?P<word1>{_WORD}) and (?:one|the other) (?P<word2>{_WORD})", _alike),
        (f"{_one('1')} (?:but no|and no|without a|but not a) {_noun('2')}", _lacks),
        (f"{_one()} (?:that is not|which is not) (?P<not>{_COLOR})", _not_colored),
        (f"{_one()} but not a (?P<not>{_COLOR}) one", _not_colored),
        (f"only {_noun(count=2)}", _every),
        (f"only (?P<color>{_COLOR}) shapes", _every),
        (f"every (?:object|shape) is (?:a {_noun()}|(?P<plain>{_COLOR}))",
         lambda words: (Every(Kind(color=words["plain"]) if "plain" in words else _kind(words)),)),
        (f"all (?:objects|shapes) are (?:{_noun(count=2)}|(?P<plain>{_COLOR}))",
         lambda words: (Every(Kind(color=words["plain"]) if "plain" in words else _kind(words)),)),
    )
)  # fmt: skip
