"""GenEval's verdicts: golden cases of the official scorer, and a plain re-statement of its rules on random ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semantic_routing.evaluation.geneval.verdict import (
    CLASSES,
    COLORS,
    RELATIONS,
    Detection,
    check_metadata,
    evaluate_detections,
    keep_confident,
    overlap,
    relative_position,
    score_image,
)


def golden(shared: Path, name: str) -> list[dict[str, Any]]:
    path = shared / "golden" / "geneval" / name
    if not path.is_file():
        pytest.skip(f"no golden cases {path}")
    return json.loads(path.read_text(encoding="utf-8"))


def test_golden_verdicts(shared: Path) -> None:
    cases = golden(shared, "evaluate.json")
    verdicts = [evaluate_detections(case["objects"], case["metadata"]) for case in cases]
    assert len(cases) == 829
    assert [correct for correct, _ in verdicts] == [case["correct"] for case in cases]
    # One fault a line, as many as the official scorer finds; none where all is well.
    assert [reason.count("\n") + bool(reason) for _, reason in verdicts] == [
        case["reason"].count("\n") + bool(case["reason"]) for case in cases
    ]


def test_golden_relations(shared: Path) -> None:
    cases = golden(shared, "relative_position.json")
    assert len(cases) == 300
    assert [relative_position(case["a"], case["b"]) for case in cases] == [set(case["relations"]) for case in cases]
    assert [overlap(case["a"], case["b"]) for case in cases] == pytest.approx([case["iou"] for case in cases])


def plain_relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """The rule for positions, number by number."""
    x, y = (a[0] + a[2]) / 2 - (b[0] + b[2]) / 2, (a[1] + a[3]) / 2 - (b[1] + b[3]) / 2
    free_x = max(abs(x) - 0.1 * (abs(a[2] - a[0]) + abs(b[2] - b[0])), 0) * math.copysign(1, x)
    free_y = max(abs(y) - 0.1 * (abs(a[3] - a[1]) + abs(b[3] - b[1])), 0) * math.copysign(1, y)
    if abs(free_x) < 1e-3 and abs(free_y) < 1e-3:
        return set()
    far = math.sqrt(x * x + y * y)
    found = {"left of"} if free_x / far < -0.5 else set()
    found |= {"right of"} if free_x / far > 0.5 else set()
    found |= {"above"} if free_y / far < -0.5 else set()
    return found | ({"below"} if free_y / far > 0.5 else set())


def plain_verdict(objects: dict[str, list[dict[str, Any]]], metadata: dict[str, Any]) -> bool:
    """The official rules in their own order, one clause after another."""
    right, groups = True, []
    for clause in metadata["include"]:
        good = True
        found = objects.get(clause["class"], [])[: clause["count"]]
        if len(found) < clause["count"]:
            good = False
        else:
            if "color" in clause:
                good = len([one for one in found if one["color"] == clause["color"]]) >= clause["count"]
            if good and "position" in clause:
                target = groups[clause["position"][1]]
                good = target is not None and all(
                    clause["position"][0] in plain_relations(one["box"], other["box"])
                    for one in found
                    for other in target
                )
        right = right and good
        groups.append(found if good else None)
    for clause in metadata.get("exclude", []):
        if len(objects.get(clause["class"], [])) >= clause["count"]:
            right = False
    return right


def random_box(rng: random.Random) -> list[float]:
    """Often of no size, upside down, or in a place where others are."""
    side = rng.choice((0, 5, 10, 100))
    x, y = rng.choice((0, 10, 50)), rng.choice((0, 10, 50))
    return [x, y, x + rng.randint(-5, 5) * side / 5, y + rng.randint(0, side), rng.random()]


def random_case(rng: random.Random) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    names, colors = ["cat", "dog", "cup"], ["red", "blue"]
    objects = {
        name: [{"box": random_box(rng), "color": rng.choice(colors)} for _ in range(rng.randint(0, 4))]
        for name in names
        if rng.random() < 0.9
    }
    include: list[dict[str, Any]] = []
    for place in range(rng.randint(1, 3)):
        clause: dict[str, Any] = {"class": rng.choice(names), "count": rng.choice((1, 1, 1, 2, 3))}
        if rng.random() < 0.4:
            clause["color"] = rng.choice(colors)
        if place and rng.random() < 0.6:
            clause["position"] = [rng.choice(RELATIONS), rng.randrange(place)]
        include.append(clause)
    metadata: dict[str, Any] = {"include": include}
    if rng.random() < 0.3:
        metadata["exclude"] = [{"class": rng.choice(names), "count": rng.randint(0, 4)}]
    return objects, metadata


def test_verdicts_equal_a_plain_statement_of_the_rules() -> None:
    rng = random.Random(0)
    right = 0
    for _ in range(4000):
        objects, metadata = random_case(rng)
        correct, reason = evaluate_detections(objects, metadata)
        assert correct == plain_verdict(objects, metadata), (objects, metadata)
        assert bool(reason) != correct
        right += correct
    assert 400 < right < 3600


def test_relations_equal_a_plain_statement_of_the_rule() -> None:
    rng = random.Random(1)
    seen: set[frozenset[str]] = set()
    for _ in range(4000):
        a, b = random_box(rng), random_box(rng)
        found = relative_position(a, b)
        assert found == plain_relations(a, b), (a, b)
        seen.add(frozenset(found))
    assert len(seen) == 9  # none, each of the four, and each corner


def test_relations_at_the_limits() -> None:
    point = [0, 0, 0, 0]
    assert relative_position(point, point) == set()
    assert relative_position([0.0009, 0, 0.0009, 0], point) == set()
    assert relative_position([0.002, 0, 0.002, 0], point) == {"right of"}
    # Sizes sum to 50: of a distance of 10 just half is left, of 11 more.
    assert relative_position([10, 0, 10, 0], [-25, 0, 25, 0]) == set()
    assert relative_position([11, 0, 11, 0], [-25, 0, 25, 0]) == {"right of"}
    assert relative_position([-3, -3, -3, -3], point) == {"left of", "above"}
    # The margin shortens what is left, but not the distance that it is compared with.
    assert relative_position([10, 8, 10, 8], [-10, -40, 10, 40]) == {"right of"}


def test_a_failed_colour_leaves_no_target() -> None:
    metadata = {
        "include": [
            {"class": "cat", "count": 1, "color": "red"},
            {"class": "dog", "count": 1, "position": ["left of", 0]},
        ]
    }
    objects = {"cat": [{"box": [50, 0, 60, 9, 0.9], "color": "blue"}], "dog": [{"box": [0, 0, 9, 9, 0.9]}]}
    correct, reason = evaluate_detections(objects, metadata)
    assert not correct
    assert reason == "expected 1 red cat, found blue\nexpected dog left of cat, but there is no cat as asked for"
    objects["cat"][0]["color"] = "red"
    assert evaluate_detections(objects, metadata) == (True, "")


def test_only_the_most_confident_count() -> None:
    red, blue = {"box": [0, 0, 1, 1, 0.9], "color": "red"}, {"box": [0, 0, 1, 1, 0.8], "color": "blue"}
    metadata = {"include": [{"class": "cat", "count": 1, "color": "blue"}]}
    assert not evaluate_detections({"cat": [red, blue]}, metadata)[0]
    assert evaluate_detections({"cat": [blue, red]}, metadata)[0]


def test_what_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="a colour of cat, but a detection of it has no 'color'"):
        evaluate_detections(
            {"cat": [{"box": [0, 0, 1, 1, 1]}]}, {"include": [{"class": "cat", "count": 1, "color": "red"}]}
        )
    with pytest.raises(ValueError, match="left of object 0, but that is not named before it"):
        evaluate_detections(
            {"cat": [{"box": [0, 0, 1, 1, 1]}]},
            {"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
        )


def seen(score: float, *box: float) -> Detection:
    return Detection((*box,) if len(box) == 4 else (0.0, 0.0, 9.0, 9.0), score)


def test_filtering() -> None:
    found = {"cat": [seen(0.3), seen(0.31), seen(0.95), seen(0.31, 0.0, 0.0, 1.0, 1.0)], "dog": [seen(0.3)]}
    kept = keep_confident(found, 0.3)
    assert list(kept) == ["cat"]
    assert [one.score for one in kept["cat"]] == [0.95, 0.31, 0.31]
    assert kept["cat"][1].box == (0.0, 0.0, 1.0, 1.0)  # of equal scores the later one
    many = keep_confident({"cup": [seen(0.5 + i / 100) for i in range(30)]}, 0.3)["cup"]
    assert [one.score for one in many] == [0.5 + i / 100 for i in range(29, 13, -1)]


def test_suppression_of_overlaps_equals_a_plain_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.integers(0, 20, (12, 2, 2))
        boxes = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1).astype(float).tolist()
        objects = [Detection(tuple(box), score) for box, score in zip(boxes, rng.random(12).tolist(), strict=True)]
        kept: list[Detection] = []
        for one in sorted(objects, key=lambda one: -one.score):
            if one.score > 0.2 and all(overlap(one.box, better.box) < 0.4 for better in kept):
                kept.append(one)
        assert keep_confident({"cat": objects}, 0.2, max_overlap=0.4)["cat"] == kept
    assert overlap([0, 0, 9, 9], [0, 0, 9, 9]) == 1  # which a limit of 1 would drop, were there one
    assert keep_confident({"cat": [seen(0.9), seen(0.8)]}, 0.3)["cat"] == [seen(0.9), seen(0.8)]


class Planted:
    """Sees what it is told to, and remembers what it was asked."""

    def __init__(self, found: dict[str, list[Detection]]) -> None:
        self.identity = {"name": "planted"}
        self.found = found
        self.asked: list[Any] = []

    def __call__(self, image: Image.Image, min_score: float) -> dict[str, list[Detection]]:
        self.asked.append((image.size, image.mode, min_score))
        return self.found


class ByPlace:
    """Calls what lies at the left red and all else blue."""

    def __init__(self) -> None:
        self.identity = {"name": "by place"}
        self.asked: list[tuple[str, int]] = []

    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        self.asked.append((name, len(objects)))
        return ["red" if one.box[0] < 10 else "blue" for one in objects]


def test_scoring_an_image() -> None:
    detector = Planted(
        {
            "cat": [seen(0.5, 20.0, 0.0, 29.0, 9.0), seen(0.8, 0.0, 0.0, 9.0, 9.0), seen(0.2)],
            "dog": [seen(0.4)],
            "cup": [seen(0.1)],
        }
    )
    colors = ByPlace()
    metadata = {
        "tag": "color_attr",
        "prompt": "a photo of a red cat and two blue dogs",
        "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 2, "color": "blue"}],
    }
    image = Image.new("RGBA", (40, 30))
    record = score_image(image, metadata, detector, colors)
    assert detector.asked == [((40, 30), "RGB", 0.3)]
    assert colors.asked == [("cat", 1)]  # only what decides: of the dogs there are too few
    assert record == {
        "correct": False,
        "reason": "expected 2 dog, found 1",
        "detections": {
            "cat": [{"box": [0.0, 0.0, 9.0, 9.0, 0.8], "color": "red"}, {"box": [20.0, 0.0, 29.0, 9.0, 0.5]}],
            "dog": [{"box": [0.0, 0.0, 9.0, 9.0, 0.4]}],
        },
    }
    again = json.loads(json.dumps(record))
    assert evaluate_detections(again["detections"], metadata) == (record["correct"], record["reason"])


def test_counting_needs_certainty() -> None:
    detector = Planted({"cat": [seen(0.95), seen(0.91), seen(0.9)]})
    metadata = {
        "tag": "counting",
        "prompt": "two cats",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
    }
    assert score_image(Image.new("RGB", (8, 8)), metadata, detector, ByPlace())["correct"]
    assert not score_image(Image.new("RGB", (8, 8)), metadata | {"tag": "colors"}, detector, ByPlace())["correct"]


def test_pictures_are_turned_upright() -> None:
    image = Image.new("RGB", (40, 30))
    image.getexif()[0x0112] = 6  # a quarter turn
    detector = Planted({})
    score_image(image, {"tag": "colors", "include": []}, detector, ByPlace())
    assert detector.asked[0][0] == (30, 40)


def test_the_official_prompts_and_names(shared: Path) -> None:
    folder = shared / "bench" / "geneval"
    if not folder.is_dir():
        pytest.skip(f"no prompts in {folder}")
    assert (folder / "object_names.txt").read_text(encoding="utf-8").split("\n")[: len(CLASSES)] == list(CLASSES)
    for line in (folder / "evaluation_metadata.jsonl").read_text(encoding="utf-8").splitlines():
        check_metadata(json.loads(line))


GOOD = {"tag": "position", "prompt": "", "include": [{"class": "cat", "count": 1}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "style"}, "no 'tag'"),
        ({"prompt": 1}, "lacks 'prompt'"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "has a class that GenEval does not know"),
        ({"include": [{"class": "cat", "count": 0}]}, "count of cat"),
        ({"include": [{"class": "cat", "count": 1, "color": "mauve"}]}, "'mauve' is not one of the colours"),
        ({"include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]}, "no object before it"),
        ({"include": [{"class": "cat", "count": 1, "position": 3}]}, "position 3 of cat"),
        ({"exclude": [{"class": "cat"}]}, "count of cat"),
        ({"exclude": 3}, "lacks"),
    ],
)
def test_prompts_of_something_else(changes: dict[str, Any], message: str) -> None:
    check_metadata(GOOD)
    with pytest.raises(ValueError, match=message):
        check_metadata(GOOD | changes)


def test_names() -> None:
    assert (len(CLASSES), len(set(CLASSES)), len(set(COLORS))) == (80, 80, 10)
