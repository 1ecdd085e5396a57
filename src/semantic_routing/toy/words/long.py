"""Drafts of long captions: several sentences about three objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from semantic_routing.toy.claims import (
    Absent,
    At,
    Background,
    Claim,
    Exists,
    Kind,
    Relation,
    spots,
)
from semantic_routing.toy.scenes import SHAPES, Scene
from semantic_routing.toy.words.draft import WHOLE, Draft
from semantic_routing.toy.words.layouts import TRIPLES, relate
from semantic_routing.toy.words.speaker import ALL_COLORS, Speaker, a, sentence

MOST_CHARACTERS = 180
"""Longest caption: 60 tokens of SmolLM2 hold it."""


def long(say: Speaker) -> Draft:
    """Several sentences about three objects: what they are, where, what is missing, the background, and asides."""
    shapes = say.facts.pick(TRIPLES)
    sizes = [say.maybe_size(0.3), None, None]
    kinds = [Kind(shape, say.facts.pick(ALL_COLORS), size) for shape, size in zip(shapes, sizes, strict=True)]
    later = say.dice.between(0, 3)  # the object whose colour is said in a sentence of its own; 3 is none
    scene, (where,) = relate(kinds, ((0, 1),), say.facts)
    heads = [say.shape(shape) for shape in shapes]
    first = [
        say.a(replace(kind, color=None) if i == later else kind, head=head, loose=False)
        for i, (kind, head) in enumerate(zip(kinds, heads, strict=True))
    ]
    place = say.place(where)
    texts = [say.pick(_INVENTORY, x=first[0], y=first[1], z=first[2])]
    if later < 3:
        texts.append(f"the {heads[later]} is {say.color(str(kinds[later].color))}")
    texts.append(f"the {heads[0]} {say.verb(place)} {place} the {heads[1]}")
    claims: list[Claim] = [Relation(kinds[0], where, kinds[1])]
    optional = _remarks(say, kinds, heads[2], scene)
    third: Claim = Exists(kinds[2])
    i = say.dice.between(0, 3)
    for text, claim in optional[i:] + optional[:i]:
        if sum(len(one) + 2 for one in texts) + len(text) > MOST_CHARACTERS:
            continue
        texts.append(text)
        if isinstance(claim, At):
            third = claim
        elif claim is not None:
            claims.append(claim)
    return Draft(" ".join(map(sentence, texts)), (*claims, third), scene, WHOLE)


def _remarks(say: Speaker, kinds: Sequence[Kind], head: str, scene: Scene) -> list[tuple[str, Claim | None]]:
    """Return where the third object is, what is missing, the background, and a truth, each with its claim."""
    spot = say.facts.pick(sorted(spots(scene.objects[2].box), key=len)[-2:])
    missing = next(shape for shape in SHAPES if shape not in {kind.shape for kind in kinds})
    noun = say.shape(missing)
    return [
        (f"the {head} is {say.spot(spot)}", At(kinds[2], spot)),
        (say.pick(_ABSENT, x=noun, ax=a(noun)), Absent(Kind(missing))),
        (say.pick(_GROUND, where=say.setting(scene.background)), Background(scene.background)),
        (truth(say), None),
    ]


_INVENTORY = (
    "the picture shows {x}, {y} and {z}",
    "there is {x}, there is {y}, and there is {z}",
    "you can see {x} together with {y} and {z}",
    "besides {x} there are {y} and {z}",
    "three things are here: {x}, {y} and {z}",
)
_ABSENT = ("there is no {x}", "nowhere is there a single {x}", "you look for {ax} in vain", "not one {x} is to be seen")
_GROUND = ("all of it is {where}", "everything is {where}", "the scene is {where}")


def truth(say: Speaker) -> str:
    """Return something true of the world that says nothing about the picture."""
    color = say.dice.pick(ALL_COLORS)
    thing = Speaker(replace(say.lexicon, unseen=say.lexicon.unseen - {"things"}), say.dice, say.facts).thing(color)
    templates = (
        "everyone knows that {x} is {color}",
        "by the way, {x} is {color}",
        "as we all know, {x} is {color}",
        "it is well known that {x} is {color}",
    )
    return say.pick(templates, x=thing, color=color)
