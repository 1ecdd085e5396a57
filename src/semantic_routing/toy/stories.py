"""Short texts about toy scenes, to train the tiny language model.

Captions alone teach it little: the named shapes and colours hardly help to predict the next word, so its hidden states
forget them. A story continues the caption with statements about the same scene. To predict these, the model must
remember the attributes of each object, as large language models do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from semantic_routing.toy.captions import NUMBERS, SETTINGS, sample
from semantic_routing.toy.claims import PLACES, Kind, relations
from semantic_routing.toy.scenes import Dice, Object, Scene

STATEMENTS = 4


def story(seed: int, index: int) -> str:
    """Return the caption of a training sample and some true statements about its scene."""
    drawn = sample(seed, index)
    dice = Dice(np.random.Generator(np.random.Philox(key=np.array([seed, index], np.uint64), counter=1 << 64)))
    sentences = [drawn.caption]
    while len(sentences) <= STATEMENTS:
        sentence = dice.pick(_KINDS)(drawn.scene, dice)
        if sentence is not None:
            sentences.append(sentence)
    return " . ".join(sentences)


def _attribute(scene: Scene, dice: Dice) -> str | None:
    thing = dice.pick(scene.objects)
    return dice.pick(
        (
            f"the {thing.shape} is {thing.color}",
            f"the {thing.color} shape is a {thing.shape}",
            f"the {thing.shape} is {thing.size}",
            f"the {thing.color} {thing.shape} is {thing.size}",
            f"the {thing.size} {thing.shape} is {thing.color}",
        )
    )


def _object(scene: Scene, dice: Dice) -> str | None:
    return f"there is a {_named(dice.pick(scene.objects), dice)}"


def _relation(scene: Scene, dice: Dice) -> str | None:
    if len(scene.objects) < 2:
        return None
    first, second = dice.pick_two(scene.objects)
    held = sorted(relations(first.box, second.box))
    if not held:
        return None
    return f"the {_named(first, dice)} is {dice.pick(PLACES[dice.pick(held)])} the {_named(second, dice)}"


def _count(scene: Scene, dice: Dice) -> str | None:
    thing = dice.pick(scene.objects)
    kind = dice.pick((Kind(thing.shape), Kind(color=thing.color), Kind()))
    count = len(kind.among(scene.objects))
    return f"there is one {kind.words()}" if count == 1 else f"there are {NUMBERS[count]} {kind.words(count)}"


def _background(scene: Scene, dice: Dice) -> str | None:
    return dice.pick((f"the background is {scene.background}", f"it is {dice.pick(SETTINGS[scene.background])}"))


def _named(thing: Object, dice: Dice) -> str:
    """Name an object by its shape, its colour, or both."""
    return dice.pick(
        (Kind(thing.shape), Kind(thing.shape), Kind(color=thing.color), Kind(thing.shape, thing.color))
    ).words()


_KINDS: tuple[Callable[[Scene, Dice], str | None], ...] = (
    _attribute,
    _attribute,
    _object,
    _relation,
    _count,
    _background,
)
