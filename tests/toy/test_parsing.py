"""Claims that are read back from prompts."""

from __future__ import annotations

import pytest

from semantic_routing.toy.captions import TAGS, sample
from semantic_routing.toy.claims import Background, Claim, Count, Exists, Kind, Relation
from semantic_routing.toy.parsing import parse_claims


@pytest.mark.parametrize("tag", TAGS)
def test_captions_give_their_claims_back(tag: str) -> None:
    drawn = [sample(7, index, tag=tag) for index in range(200)]
    assert [(x.caption, parse_claims(x.caption)) for x in drawn] == [(x.caption, x.claims) for x in drawn]


RED, SQUARE = Kind("circle", "red"), Kind("square")


@pytest.mark.parametrize(
    ("prompt", "claims"),
    [
        ("A red circle  left of a square.", (Relation(RED, "left", SQUARE),)),
        ("a photo of one red circle and the square at night", (Exists(RED), Exists(SQUARE), Background("black"))),
        ("3 red circles on paper", (Count(RED, 3), Background("white"))),
    ],
)
def test_free_prompts_are_read(prompt: str, claims: tuple[Claim, ...]) -> None:
    assert parse_claims(prompt) == claims


@pytest.mark.parametrize(
    "prompt", ["", "a dog", "a red circle and a dog", "five circles", "a red circle left of", "circle", "two circle"]
)
def test_other_prompts_have_no_claims(prompt: str) -> None:
    assert parse_claims(prompt) is None
