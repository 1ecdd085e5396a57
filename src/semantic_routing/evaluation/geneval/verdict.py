"""GenEval's verdict: from the objects found in an image to whether it shows its prompt, and if not, why.

The rules are those of the official scorer (djghosh13/geneval, evaluation/evaluate_images.py). The object detector and
the colour classifier can be exchanged: any ``Detector`` and ``ColorClassifier`` will do. Verdicts are pure functions of
their results.

Boxes are ``[x1, y1, x2, y2]`` in pixels, y downwards; if a score is known, it is the fifth number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# The 80 classes of COCO in their order, three of them by GenEval's own names.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9
"""Objects count above this score; where the prompt is about their number, above the second."""
MAX_OBJECTS = 16
"""Objects that count of each class."""
POSITION_MARGIN = 0.1
"""Largest offset of level centres, in units of both objects' summed sizes."""

Box = Sequence[float | int] | np.ndarray


@dataclass(frozen=True)
class Detection:
    """One object that a detector saw."""

    box: tuple[float, float, float, float]
    score: float
    mask: Bool[np.ndarray, "height width"] | None = None
    """True on the object's pixels, over the whole picture; None from a detector of boxes alone."""


@runtime_checkable
class Detector(Protocol):
    """Finds objects of GenEval's classes."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return its identity in JSON types: at least ``name``, ``weights`` (their SHA-256) and ``label``."""
        ...

    def __call__(self, image: Image.Image, min_score: float) -> dict[str, list[Detection]]:
        """Return objects by class in an upright RGB picture; scores up to ``min_score`` may be left out."""
        ...


@runtime_checkable
class ColorClassifier(Protocol):
    """Names the colours of objects."""

    @property
    def identity(self) -> dict[str, Any]:
        """Return its identity, as a detector's."""
        ...

    def __call__(self, image: Image.Image, objects: Sequence[Detection], name: str) -> list[str]:
        """Return one of ``COLORS`` for each of the objects of the class ``name``."""
        ...


def score_image(
    image: Image.Image, metadata: Mapping[str, Any], detector: Detector, colors: ColorClassifier
) -> dict[str, Any]:
    """Decide whether an image shows its prompt: ``correct``, ``reason`` and the ``detections`` that determined it.

    ``evaluate_detections`` gives the same verdict for those detections. Only colours that the verdict needs are
    computed and stored.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    threshold = COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD
    kept = keep_confident(detector(image, threshold), threshold)
    detections: dict[str, list[dict[str, Any]]] = {
        name: [{"box": [*map(float, found.box), float(found.score)]} for found in objects]
        for name, objects in kept.items()
    }
    for clause in metadata.get("include", ()):
        name, objects = clause["class"], kept.get(clause["class"], [])[: clause["count"]]
        if "color" in clause and len(objects) == clause["count"]:
            for place, color in enumerate(colors(image, objects, name)):
                detections[name][place]["color"] = color
    correct, reason = evaluate_detections(detections, metadata)
    return {"correct": correct, "reason": reason, "detections": detections}


def keep_confident(
    found: Mapping[str, Sequence[Detection]],
    threshold: float,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = 1.0,
) -> dict[str, list[Detection]]:
    """Keep the objects that count, the most confident first; among equal scores, the later one comes first.

    The score must exceed ``threshold``. With ``max_overlap`` below GenEval's 1, an object is also dropped if its box
    overlaps a better one by at least that much.
    """
    kept = {}
    for name, objects in found.items():
        order = np.argsort([one.score for one in objects], kind="stable")[::-1]
        left = [objects[i] for i in order if objects[i].score > threshold][:max_objects]
        best: list[Detection] = []
        while left:
            best.append(left.pop(0))
            if max_overlap < 1:
                left = [one for one in left if overlap(best[-1].box, one.box) < max_overlap]
        if best:
            kept[name] = best
    return kept


def overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes that include their last row and column, as in GenEval."""
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return float(max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0))


def relative_position(box_a: Box, box_b: Box) -> set[str]:
    """Return the position of A relative to B: none, one or two of ``RELATIONS``.

    Centres count as level along an axis if they differ by less than ``POSITION_MARGIN`` of the summed sizes; the
    remainder, divided by the distance of the centres, must exceed a half.
    """
    corners = np.array([box_a[:4], box_b[:4]], dtype=np.float64).reshape(2, 2, 2)
    center_a, center_b = corners.mean(axis=1)
    size_a, size_b = np.abs(corners[:, 1] - corners[:, 0])
    offset = center_a - center_b
    revised = np.maximum(np.abs(offset) - POSITION_MARGIN * (size_a + size_b), 0) * np.sign(offset)
    if np.all(np.abs(revised) < 1e-3):
        return set()
    dx, dy = revised / np.linalg.norm(offset)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {relation for relation, held in zip(RELATIONS, holds, strict=True) if held}


def evaluate_detections(
    detections: Mapping[str, Sequence[Mapping[str, Any]]], metadata: Mapping[str, Any]
) -> tuple[bool, str]:
    """Return the verdict on an image's objects, and its faults, one per line; "" if there are none.

    ``detections`` has for each class the objects that count, the most confident first, as ``{"box": [x1, y1, x2, y2,
    score], "color": name}``; a colour is needed only if the prompt names one. ``metadata`` is a line of GenEval's file
    of prompts. Raises ValueError if a needed colour is missing, or if a position is relative to an object that is not
    named before.
    """
    faults = []
    groups: list[Sequence[Mapping[str, Any]] | None] = []
    include = metadata.get("include", ())
    for clause in include:
        found = detections.get(clause["class"], ())[: clause["count"]]
        fault = _fault(clause, found, include, groups)
        groups.append(None if fault else found)
        faults += [fault] if fault else []
    for clause in metadata.get("exclude", ()):
        name, count, found = clause["class"], clause["count"], detections.get(clause["class"], ())
        if len(found) >= count:
            faults.append(f"expected fewer than {count} {name}, found {len(found)}")
    return not faults, "\n".join(faults)


def _fault(
    clause: Mapping[str, Any],
    found: Sequence[Mapping[str, Any]],
    include: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[Mapping[str, Any]] | None],
) -> str:
    """Name the fault of the objects ``found`` for a clause, or ""; ``groups`` are those of earlier clauses."""
    name, count = clause["class"], clause["count"]
    if len(found) < count:
        return f"expected {count} {name}, found {len(found)}"
    if "color" in clause:
        seen = [_color(one, name) for one in found]
        if seen.count(clause["color"]) < count:
            return f"expected {count} {clause['color']} {name}, found {', '.join(seen)}"
    if "position" in clause:
        relation, target = clause["position"]
        if not -len(groups) <= target < len(groups):
            raise ValueError(f"{name} is to be {relation} object {target}, but that is not named before it")
        group, other = groups[target], include[target]["class"]
        if group is None:
            return f"expected {name} {relation} {other}, but there is no {other} as asked for"
        for one in found:
            for partner in group:
                relations = relative_position(one["box"], partner["box"])
                if relation not in relations:
                    where = " and ".join(sorted(relations)) or "in no clear direction from"
                    return f"expected {name} {relation} {other}, found it {where} {other}"
    return ""


def _color(found: Mapping[str, Any], name: str) -> str:
    if "color" not in found:
        raise ValueError(f"the prompt names a colour of {name}, but a detection of it has no 'color'")
    return found["color"]


def check_metadata(metadata: object) -> None:
    """Raise ValueError if an entry is not a GenEval prompt."""
    if not isinstance(metadata, dict) or metadata.get("tag") not in TAGS:
        raise ValueError(f"it has no 'tag' of GenEval's ({', '.join(TAGS)})")
    include, exclude = metadata.get("include"), metadata.get("exclude", [])
    if not isinstance(metadata.get("prompt"), str) or not isinstance(include, list) or not isinstance(exclude, list):
        raise ValueError("it lacks 'prompt' or the list 'include'")
    clauses = [*include, *exclude]
    for number, clause in enumerate(clauses):
        if not isinstance(clause, dict) or clause.get("class") not in CLASSES:
            raise ValueError(f"object {number} has a class that GenEval does not know")
        if not isinstance(clause.get("count"), int) or clause["count"] < 1:
            raise ValueError(f"the count of {clause['class']} is not a positive number")
        if clause.get("color", COLORS[0]) not in COLORS:
            raise ValueError(f"{clause['color']!r} is not one of the colours {', '.join(COLORS)}")
        match clause.get("position"):
            case None:
                pass
            case [relation, int(target)] if relation in RELATIONS and 0 <= target < number:
                pass
            case position:
                raise ValueError(f"position {position} of {clause['class']} is relative to no object before it")
