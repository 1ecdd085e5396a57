"""Stories of the toy world: a caption, and statements that are true of its scene."""

import re

import pytest

from semantic_routing.toy.captions import NUMBERS, SETTINGS, sample
from semantic_routing.toy.claims import PLACES, Kind, relations
from semantic_routing.toy.scenes import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene
from semantic_routing.toy.stories import STATEMENTS, story

WORDS = {word: place for place, words in PLACES.items() for word in words}


def kind(words: str) -> Kind:
    """Read the kind of objects in a phrase, such as "the small red circle"."""
    found = words.replace("crosses", "cross").split()
    named = [next((word for word in options if word in found or f"{word}s" in found), None) for options in OPTIONS]
    return Kind(*named)


OPTIONS = (SHAPES, COLORS, SIZES)


def is_true(statement: str, scene: Scene) -> bool:
    for background in BACKGROUNDS:
        if statement in (f"the background is {background}", *(f"it is {words}" for words in SETTINGS[background])):
            return scene.background == background
    if counted := re.fullmatch(r"there (?:is|are) (one|two|three|four) (.*)", statement):
        wanted = {"one": 1} | {word: number for number, word in NUMBERS.items()}
        return len(kind(counted[2]).among(scene.objects)) == wanted[counted[1]]
    for words in sorted(WORDS, key=len, reverse=True):
        if f" is {words} the " in statement:
            first, second = (kind(part).among(scene.objects) for part in statement.split(f" is {words} the "))
            return any(WORDS[words] in relations(a.box, b.box) for a in first for b in second)
    return bool(kind(statement).among(scene.objects))


def test_every_statement_is_true_of_the_captions_scene():
    for index in range(300):
        caption, *statements = story(5, index).split(" . ")
        drawn = sample(5, index)
        assert caption == drawn.caption
        assert len(statements) == STATEMENTS
        for statement in statements:
            assert is_true(statement, drawn.scene), (statement, drawn.scene)


@pytest.mark.parametrize("beginning", ["the background is", "it is", "there is one", "there are", "there is a", "the "])
def test_statements_of_every_sort_come(beginning: str):
    statements = [statement for index in range(60) for statement in story(6, index).split(" . ")[1:]]
    assert any(statement.startswith(beginning) for statement in statements)


def test_a_story_depends_on_seed_and_index_alone():
    assert story(0, 3) == story(0, 3)
    assert len({story(seed, index) for seed in range(2) for index in range(10)}) == 20
