"""Samples of the toy world: captions, the claims they make, and scenes in which the claims hold.

A sample is a pure function of ``(seed, index)``. Its tag, one of eleven skills, determines the wording, the claims and
the scene; details that the caption does not mention are random. The first six tags are GenEval's (Ghosh et al., 2023),
the other five follow the harder skills of GenAI-Bench (Li et al., 2024). ``toy/checker.py`` tests the claims on pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from jaxtyping import UInt8

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
from semantic_routing.toy.scenes import (
    BACKGROUNDS,
    CANVAS,
    COLORS,
    SHAPES,
    SIZES,
    Dice,
    Object,
    Scene,
    arrange,
    changed,
    complete,
    render,
    scatter,
)

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TAG_WEIGHTS = {
    "single_object": 0.10,
    "two_object": 0.13,
    "counting": 0.12,
    "colors": 0.07,
    "position": 0.17,
    "color_attr": 0.13,
    "comparison": 0.06,
    "differentiation": 0.06,
    "negation": 0.05,
    "universal": 0.05,
    "scene": 0.06,
}
"""Probability of each tag, if no tag is requested."""
TAGS = tuple(TAG_WEIGHTS)
EVAL_SHARE = 8
"""One in this many captions, chosen by its hash, belongs to the evaluation split."""

_PICTURES = ("", "a photo of ", "a picture of ", "a drawing of ", "an image of ", "a painting of ")
_ORDERS = ("we see ", "show ", "draw ", "i want ")
OPENINGS = {
    "one": (*_PICTURES, *_ORDERS, "there is ", "this is "),
    "many": (*_PICTURES, *_ORDERS, "there are ", "these are "),
    "sentence": ("", "a photo where ", "a picture where ", "a drawing where ", "an image where ", "here "),
}
"""Beginnings of captions, before a singular noun phrase, a plural one, or a sentence."""
SETTINGS = {
    "black": ("on a black background", "at night", "in the dark", "in space"),
    "gray": ("on a gray background", "in the fog", "on a road", "on a rock"),
    "white": ("on a white background", "in the snow", "on paper", "in the clouds"),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True)
class Draft:
    """A caption's phrase and claims, and the parts of the scene that they fix."""

    phrase: str
    claims: tuple[Claim, ...]
    kinds: tuple[Kind, ...]
    """Kind of each object in the scene."""
    form: str = "one"
    """Key of ``OPENINGS``."""
    where: str | None = None
    """Relation of the first object to the second."""
    background: str | None = None


def _populate(draft: Draft, dice: Dice) -> Scene:
    # Three large objects hardly fit in one picture: of three or more, at most one is large.
    things: list[Object] = []
    for kind in draft.kinds:
        large = len(draft.kinds) < 3 or all(thing.size == "small" for thing in things)
        things.append(complete(kind, large, dice))
    background = draft.background or dice.pick(tuple(BACKGROUNDS))
    if draft.where is not None:
        return Scene(background, arrange(things[0], draft.where, things[1], dice))
    return Scene(background, scatter(things, dice))


def _sometimes_size(dice: Dice) -> str | None:
    return dice.pick(tuple(SIZES)) if dice.chance(0.25) else None


def _single_object(dice: Dice) -> Draft:
    kind = Kind(dice.pick(SHAPES), size=_sometimes_size(dice))
    return Draft(f"a {kind.words()}", (Exists(kind),), (kind,))


def _two_object(dice: Dice) -> Draft:
    first, second = (Kind(shape, size=_sometimes_size(dice)) for shape in dice.pick_two(SHAPES))
    link = dice.pick(("and", "and", "with", "together with", "beside"))
    return Draft(f"a {first.words()} {link} a {second.words()}", (Exists(first), Exists(second)), (first, second))


def _counting(dice: Dice) -> Draft:
    kind, count = Kind(dice.pick(SHAPES)), dice.between(2, 4)
    exactly = dice.pick(("", "", "exactly "))
    return Draft(f"{exactly}{NUMBERS[count]} {kind.words(count)}", (Count(kind, count),), (kind,) * count, "many")


def _colors(dice: Dice) -> Draft:
    kind = Kind(dice.pick(SHAPES), dice.pick(tuple(COLORS)), _sometimes_size(dice))
    plain = replace(kind, color=None).words()
    phrase = dice.pick((f"a {kind.words()}", f"a {kind.words()}", f"a {plain} that is {kind.color}"))
    return Draft(phrase, (Exists(kind),), (kind,))


def _position(dice: Dice) -> Draft:
    first, second = (Kind(shape) for shape in dice.pick_two(SHAPES))
    where = dice.pick(tuple(PLACES))
    phrase = f"a {first.words()} {dice.pick(PLACES[where])} a {second.words()}"
    return Draft(phrase, (Relation(first, where, second),), (first, second), where=where)


def _color_attr(dice: Dice) -> Draft:
    pairs = zip(dice.pick_two(SHAPES), dice.pick_two(tuple(COLORS)), strict=True)
    first, second = (Kind(shape, color, _sometimes_size(dice)) for shape, color in pairs)
    link = dice.pick(("and", "and", "with"))
    return Draft(f"a {first.words()} {link} a {second.words()}", (Exists(first), Exists(second)), (first, second))


def _comparison(dice: Dice) -> Draft:
    if dice.chance(0.5):
        more, fewer = (Kind(shape) for shape in dice.pick_two(SHAPES))
        phrase = dice.pick(
            (f"more {more.words(2)} than {fewer.words(2)}", f"fewer {fewer.words(2)} than {more.words(2)}")
        )
        kinds = (more,) * dice.between(2, 3) + (fewer,)
        return Draft(phrase, (MoreThan(more, fewer),), kinds, "many")
    if dice.chance(0.5):
        large, small = (Kind(shape) for shape in dice.pick_two(SHAPES))
    else:
        shape = dice.pick(SHAPES)
        large, small = (Kind(shape, color) for color in dice.pick_two(tuple(COLORS)))
    larger, smaller = dice.pick(("larger", "bigger")), dice.pick(("smaller", "tinier"))
    phrase = dice.pick(
        (
            f"the {large.words()} is {larger} than the {small.words()}",
            f"the {small.words()} is {smaller} than the {large.words()}",
        )
    )
    kinds = (replace(large, size="large"), replace(small, size="small"))
    return Draft(phrase, (LargerThan(large, small),), kinds, "sentence")


def _differentiation(dice: Dice) -> Draft:
    shape = dice.pick(SHAPES)
    if dice.chance(0.7):
        words = dice.pick_two(tuple(COLORS))
        first, second = (Kind(shape, color=word) for word in words)
    else:
        words = dice.pick_two(tuple(SIZES))
        first, second = (Kind(shape, size=word) for word in words)
    both = Kind(shape)
    other = dice.pick(("and one", "and the other"))
    phrase = f"two {both.words(2)}, one {words[0]} {other} {words[1]}"
    return Draft(phrase, (Count(both, 2), Exists(first), Exists(second)), (first, second), "many")


def _negation(dice: Dice) -> Draft:
    if dice.chance(0.6):
        there, absent = (Kind(shape) for shape in dice.pick_two(SHAPES))
        link = dice.pick(("but no", "and no", "without a", "but not a"))
        phrase = f"a {there.words()} {link} {absent.words()}"
        return Draft(phrase, (Exists(there), Absent(absent)), (there,))
    shape = dice.pick(SHAPES)
    color, other = dice.pick_two(tuple(COLORS))
    link = dice.pick(("that is not", "but not a", "which is not"))
    phrase = f"a {shape} {link} {color}" + (" one" if link == "but not a" else "")
    return Draft(phrase, (Exists(Kind(shape)), Absent(Kind(shape, color))), (Kind(shape, other),))


def _universal(dice: Dice) -> Draft:
    color = dice.pick(tuple(COLORS)) if dice.chance(0.7) else None
    kind = Kind(dice.pick(SHAPES) if color is None or dice.chance(0.3) else None, color)
    kinds = (kind,) * dice.between(2, 4)
    if dice.chance(0.3):
        return Draft(f"only {kind.words(2)}", (Every(kind),), kinds, "many")
    one = str(color) if kind.shape is None else f"a {kind.words()}"
    many = str(color) if kind.shape is None else kind.words(2)
    phrase = dice.pick(
        (
            f"every object is {one}",
            f"every shape is {one}",
            f"all objects are {many}",
            f"all shapes are {many}",
        )
    )
    return Draft(phrase, (Every(kind),), kinds, "sentence")


def _scene(dice: Dice) -> Draft:
    kind = Kind(dice.pick(SHAPES), dice.pick(tuple(COLORS)) if dice.chance(0.5) else None)
    background = dice.pick(tuple(BACKGROUNDS))
    phrase = f"a {kind.words()} {dice.pick(SETTINGS[background])}"
    return Draft(phrase, (Exists(kind), Background(background)), (kind,), background=background)


_DRAFTS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
    "comparison": _comparison,
    "differentiation": _differentiation,
    "negation": _negation,
    "universal": _universal,
    "scene": _scene,
}


@dataclass(frozen=True)
class Sample:
    """A caption, its claims, and a scene in which they hold."""

    caption: str
    tag: str
    claims: tuple[Claim, ...]
    scene: Scene
    size: int = CANVAS
    """Side of the picture in pixels."""

    @property
    def image(self) -> UInt8[np.ndarray, "size size 3"]:
        """The scene as RGB pixels, rendered at each access."""
        return render(self.scene, self.size)


def split_of(caption: str) -> str:
    """Return a caption's split: ``eval`` for one in eight, else ``train``; no caption is in both."""
    return "train" if blake2b(caption.encode(), digest_size=1).digest()[0] % EVAL_SHARE else "eval"


def sample(seed: int, index: int, *, split: str = "train", tag: str | None = None, size: int = CANVAS) -> Sample:
    """Draw the sample at ``index`` of the endless stream ``seed``, with a given or random tag.

    Captions are drawn until one belongs to the split.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"unknown split {split!r}; use 'train' or 'eval'")
    if tag is not None and tag not in TAGS:
        raise ValueError(f"unknown tag {tag!r}; use one of {', '.join(TAGS)}")
    if size < 1:
        raise ValueError(f"a picture of {size} pixels cannot be drawn; ask for at least 1 pixel")
    if seed < 0 or index < 0:
        raise ValueError(f"seed {seed} and index {index} must be at least 0")
    key = np.array([seed, index], dtype=np.uint64)
    dice = Dice(np.random.Generator(np.random.Philox(key=key)))
    if tag is None:
        tag = dice.weighted(TAG_WEIGHTS)
    while True:
        draft = _DRAFTS[tag](dice)
        caption = dice.pick(OPENINGS[draft.form]) + draft.phrase
        if split_of(caption) == split:
            return Sample(caption, tag, draft.claims, _populate(draft, dice), size)


def prompts(seed: int, n: int, tags: Sequence[str] = TAGS) -> list[Sample]:
    """Draw ``n`` samples of the evaluation split, tag after tag; captions repeat only if a tag has no more."""
    return distinct(sample, seed, n, tags)


def distinct(draw: Callable[..., Sample], seed: int, n: int, tags: Sequence[str]) -> list[Sample]:
    """Draw ``n`` samples of a world's evaluation split by its function ``draw``, tag after tag, as ``prompts`` does."""
    if n < 1 or not tags:
        raise ValueError(f"asked for {n} prompts of {len(tags)} tags; ask for at least one of each")
    chosen: list[Sample] = []
    seen: set[str] = set()
    spent: set[str] = set()  # tags without a new caption in 200 draws
    index = 0
    for turn in range(n):
        tag = tags[turn % len(tags)]
        for _ in range(1 if tag in spent else 200):
            candidate = draw(seed, index, split="eval", tag=tag)
            index += 1
            if candidate.caption not in seen:
                break
        else:
            spent.add(tag)
        seen.add(candidate.caption)
        chosen.append(candidate)
    return chosen


def falsify(original: Sample, rng: np.random.Generator) -> Sample:
    """Change a sample's scene until exactly one of its claims is false; the caption stays."""
    dice = Dice(rng)
    while True:
        scene = changed(original.scene, dice)
        if scene is None:
            continue
        faults = [claim.fault(scene.objects, scene.background) is not None for claim in original.claims]
        if sum(faults) == 1:
            return replace(original, scene=scene)
