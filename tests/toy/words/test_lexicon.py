"""The word lists: one reading each, large, and a fixed third held out."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from semantic_routing.toy.claims import PLACES, SPOTS
from semantic_routing.toy.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES
from semantic_routing.toy.words.captions import sample
from semantic_routing.toy.words.lexicon import LISTS, held_out, parts, plural, words

READINGS = {
    "colors": COLORS, "things": COLORS, "shapes": SHAPES, "sizes": SIZES, "counts": "23456",
    "relations": PLACES, "spots": SPOTS, "settings": BACKGROUNDS,
}  # fmt: skip


@pytest.mark.parametrize("name", LISTS)
def test_every_word_has_one_known_reading(name: str) -> None:
    known = words(name)
    assert {word.reading for word in known} == set(READINGS[name])
    spoken = [form.lower() for word in known for form in {word.text, word.plural} if form]
    assert [text for text, count in Counter(spoken).items() if count > 1] == []
    assert all(word.text.isascii() and word.text == " ".join(word.text.split()) for word in known)


def test_the_lists_are_as_long_as_promised() -> None:
    assert len(words("colors")) + len(words("things")) >= 300
    assert len(words("shapes")) >= 120
    assert min(Counter(word.reading for word in words("shapes")).values()) >= 20


@pytest.mark.parametrize("name", LISTS)
def test_a_third_of_every_reading_is_held_out(name: str) -> None:
    total = Counter(word.reading for word in words(name))
    held = Counter(word.reading for word in words(name) if (name, word.text) in held_out())
    for reading, size in total.items():
        assert abs(held[reading] - size / 3) <= 1
    share = held.total() / total.total()
    assert share == pytest.approx(1 / 3, abs=0.035)
    plain = {reading: next(word for word in words(name) if word.reading == reading) for reading in total}
    assert not {(name, word.text) for word in plain.values()} & held_out()


def test_the_held_out_words_are_fixed() -> None:
    """A study's scores on unseen words mean nothing if a later version trains on them."""
    for name, text in (("things", "borage"), ("shapes", "napkin"), ("sizes", "huge"), ("relations", "beneath")):
        assert any(word.text == text for word in words(name))
    assert ("shapes", "napkin") in held_out()
    assert ("sizes", "huge") in held_out()
    assert ("relations", "beneath") not in held_out()


COUNT = pytest.mark.parametrize("count", [800, pytest.param(4000, marks=pytest.mark.stress)])


@cache
def spoken(count: int) -> tuple[str, ...]:
    """Return training captions."""
    return tuple(sample(8, index).caption for index in range(count))


@COUNT
def test_no_part_of_a_held_out_word_is_in_a_training_caption(count: int) -> None:
    held = set().union(*(parts(text) for _, text in held_out()))
    trained = set().union(*(parts(word.text) for name in LISTS for word in words(name)
                            if (name, word.text) not in held_out()))  # fmt: skip
    assert len(held) > 200
    assert not held & trained
    assert not held & {part for caption in spoken(count) for part in parts(caption)}


@COUNT
def test_no_held_out_phrase_is_in_a_training_caption(count: int) -> None:
    phrases = [text.replace("{}", r"[\w' -]+") for _, text in held_out()]
    pattern = re.compile("|".join(rf"(?<![\w-]){phrase}(?![\w-])" for phrase in phrases))
    for caption in spoken(count):
        assert not (found := pattern.search(caption)), (caption, found)


def test_plurals_and_parts() -> None:
    assert [plural(noun) for noun in ("coin", "cross", "box", "dish", "party", "toy", "plus sign")] == [
        "coins", "crosses", "boxes", "dishes", "parties", "toys", "plus signs",
    ]  # fmt: skip
    assert parts("at nine o'clock from") == {"nine", "oclock"}
    assert parts("Rubik's cubes the color of blood-red") == {"rubik", "cube", "blood"}
