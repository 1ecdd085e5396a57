"""Claims, tested on hand-made objects."""

import json
import os
from pathlib import Path

import pytest

from semantic_routing.toy.claims import (
    Absent,
    Background,
    Count,
    Every,
    Exists,
    Kind,
    LargerThan,
    MoreThan,
    Relation,
    relations,
)
from semantic_routing.toy.scenes import Object

RED_CIRCLE = Object("circle", "red", "large", 8.0, 8.0, 14)
BLUE_CIRCLE = Object("circle", "blue", "small", 26.0, 9.0, 8)
RED_CROSS = Object("cross", "red", "small", 8.0, 26.0, 8)
THINGS = (RED_CIRCLE, BLUE_CIRCLE, RED_CROSS)
CIRCLE, CROSS, SQUARE = Kind("circle"), Kind("cross"), Kind("square")


@pytest.mark.parametrize(
    ("claim", "fault"),
    [
        (Exists(Kind("circle", "red", "large")), None),
        (Exists(Kind("circle", "red", "small")), "found no small red circle"),
        (Absent(Kind("cross", "blue")), None),
        (Absent(CROSS), "found a cross, wanted none"),
        (Count(CIRCLE, 2), None),
        (Count(CIRCLE, 1), "found 2 circles, wanted 1"),
        (Count(CIRCLE, 3), "found 2 circles, wanted 3"),
        (Count(Kind("cross", "red"), 2), "found 1 red cross, wanted 2"),
        (Count(SQUARE, 2), "found 0 squares, wanted 2"),
        (Every(Kind("circle")), "found a red cross, wanted only circles"),
        (Every(Kind(color="red")), "found a blue circle, wanted only red shapes"),
        (Relation(Kind(color="blue"), "right", Kind(color="red")), None),
        (Relation(CROSS, "below", CIRCLE), None),
        (Relation(CIRCLE, "below", CROSS), "the circle is not below the cross"),
        (Relation(CIRCLE, "left", SQUARE), "found no square"),
        (MoreThan(CIRCLE, CROSS), None),
        (MoreThan(CROSS, CIRCLE), "found 1 cross and 2 circles, wanted more crosses"),
        (MoreThan(CIRCLE, SQUARE), "found no square"),
        (LargerThan(Kind("circle", "red"), Kind("circle", "blue")), None),
        (LargerThan(CROSS, Kind("circle", "blue")), "the cross is not larger than the blue circle"),
        (LargerThan(SQUARE, CIRCLE), "found no square"),
        (Background("gray"), None),
        (Background("white"), "the background is gray, wanted white"),
    ],
)
def test_faults(claim, fault):
    assert claim.fault(THINGS, "gray") == fault


def test_larger_is_more_than_a_fifth_longer():
    ten, twelve, thirteen = (
        Object("circle", c, "", 8.0, 8.0, n) for c, n in (("red", 10), ("blue", 12), ("green", 13))
    )
    larger = [LargerThan(Kind(color=one), Kind(color="red")) for one in ("blue", "green")]
    faults = [claim.fault((ten, twelve, thirteen), "gray") for claim in larger]
    assert faults == ["the blue shape is not larger than the red shape", None]


def test_every_needs_objects():
    assert Every(CIRCLE).fault((), "gray") == "found no objects"
    assert Every(CIRCLE).fault((RED_CIRCLE, BLUE_CIRCLE), "gray") is None


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-10, 0, {"left"}),
        (10, 0, {"right"}),
        (0, -10, {"above"}),
        (0, 10, {"below"}),
        (40, 40, {"right", "below"}),  # (40 - 2) / 56.6 > 0.5 on both axes
        (4, 4, set()),  # (4 - 2) / 5.7 < 0.5
        (0, 0, set()),
        (-10, 6, {"left"}),  # (6 - 2) / 11.7 < 0.5
    ],
)
def test_relations_follow_genevals_rule(x, y, expected):
    assert relations((x - 5.0, y - 5.0, x + 5.0, y + 5.0), (-5.0, -5.0, 5.0, 5.0)) == expected


def test_relations_agree_with_genevals_own_function():
    shared = Path(os.environ.get("SEMROUTE_SHARED", Path(__file__).parents[3] / "shared"))
    path = shared / "golden" / "geneval" / "relative_position.json"
    if not path.is_file():
        pytest.skip(f"golden cases are not at {path}")
    for case in json.loads(path.read_text()):
        expected = {words.removesuffix(" of") for words in case["relations"]}
        assert relations(tuple(case["a"]), tuple(case["b"])) == expected


def test_words():
    assert Kind("cross", "red", "small").words(2) == "small red crosses"
    assert Kind(color="blue").words() == "blue shape"
