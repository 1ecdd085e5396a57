"""Samples of the world of words: captions by tag, and prompts of the evaluation split.

As in the toy world, a sample is a pure function of ``(seed, index)``, and one caption in eight, by its hash, is for
evaluation. The tags ``unseen_*`` use held-out words, so they have no training split.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from semantic_routing.toy.captions import TAG_WEIGHTS, Sample, distinct, split_of
from semantic_routing.toy.scenes import CANVAS, Dice
from semantic_routing.toy.words import logic, objects
from semantic_routing.toy.words.arithmetic import arithmetic
from semantic_routing.toy.words.draft import FRAGMENT, WHOLE, Draft, Drafting
from semantic_routing.toy.words.lexicon import FOLDER, Lexicon
from semantic_routing.toy.words.long import MOST_CHARACTERS, long, truth
from semantic_routing.toy.words.reference import reference
from semantic_routing.toy.words.speaker import Speaker, sentence

_TRAINED: dict[str, Drafting] = {
    "single_object": objects.single_object,
    "two_object": objects.two_object,
    "counting": objects.counting,
    "colors": objects.colors,
    "position": objects.position,
    "color_attr": objects.color_attr,
    "comparison": logic.comparison,
    "differentiation": logic.differentiation,
    "negation": logic.negation,
    "universal": logic.universal,
    "scene": objects.scene,
    "reference": reference,
    "arithmetic": arithmetic,
    "long": long,
}
_UNSEEN: dict[str, tuple[tuple[str, ...], tuple[Drafting, ...]]] = {
    "unseen_color": (("colors", "things"), (objects.colors, objects.color_attr)),
    "unseen_shape": (("shapes",), (objects.single_object, objects.two_object, objects.colors)),
    "unseen_size": (("sizes",), (objects.single_object,)),
    "unseen_count": (("counts",), (objects.counting,)),
    "unseen_place": (("relations", "spots", "settings"), (objects.position, objects.position, objects.scene)),
}
"""For each tag the lists of which it uses held-out words, and the drafts that need a word of them."""
TRAINED_TAGS, UNSEEN_TAGS = tuple(_TRAINED), tuple(_UNSEEN)
TAGS = (*TRAINED_TAGS, *UNSEEN_TAGS)
NEW_WEIGHTS = {"reference": 0.14, "arithmetic": 0.08, "long": 0.14}
WEIGHTS = {tag: (1 - sum(NEW_WEIGHTS.values())) * weight for tag, weight in TAG_WEIGHTS.items()} | NEW_WEIGHTS
"""Probability of each tag in training: the toy world's tags among themselves as there."""
LEXICONS = {tag: Lexicon(frozenset(lists)) for tag, (lists, _) in _UNSEEN.items()}
SEEN = Lexicon()

OPENINGS = (
    *(
        "a photo of ",
        "a picture of ",
        "a drawing of ",
        "an image of ",
        "a painting of ",
        "a sketch of ",
        "clip art of ",
    ),
    *("an illustration of ", "a photograph of ", "a rendering of ", "a simple graphic of ", "a postcard showing "),
    *(
        "a crayon drawing of ",
        "a minimalist print of ",
        "a child's drawing of ",
        "we see ",
        "show me ",
        "draw ",
        "paint ",
    ),
    *("I want ", "please make ", "imagine ", "give me ", "I would like to have "),
)
"""Beginnings before a noun phrase; as many captions have none."""
STARTS = ("this time, ", "today, ", "for once, ", "well, ", "as promised, ", "in short, ")
"""Beginnings before a clause."""
BARE, ASIDE, TRUTH = 0.4, 0.15, 0.07
"""Shares of captions without a beginning, with an aside, and with something true of the world."""


def sample(
    seed: int, index: int, *, split: str = "train", tag: str | None = None, size: int = CANVAS, wording: int = 0
) -> Sample:
    """Draw the sample at ``index`` of the endless stream ``seed``, with a given tag or a random one of training's.

    Each ``wording`` says the same scene in other words. Words are drawn until the caption belongs to the split
    and is not too long.
    ValueError for a training sample of a held-out tag.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"unknown split {split!r}; use 'train' or 'eval'")
    if tag is not None and tag not in TAGS:
        raise ValueError(f"unknown tag {tag!r}; use one of {', '.join(TAGS)}")
    if tag in _UNSEEN and split == "train":
        raise ValueError(f"{tag} has held-out words, which training never uses; give split='eval'")
    if size < 1:
        raise ValueError(f"a picture of {size} pixels cannot be drawn; ask for at least 1 pixel")
    if min(seed, index, wording) < 0:
        raise ValueError(f"seed {seed}, index {index} and wording {wording} must be at least 0")
    key = np.array([seed, index], dtype=np.uint64)
    dice = Dice(np.random.Generator(np.random.Philox(key=key, counter=(wording + 1) << 64)))
    while True:
        facts = Dice(np.random.Generator(np.random.Philox(key=key)))
        chosen = facts.weighted(WEIGHTS) if tag is None else tag
        say = Speaker(LEXICONS.get(chosen, SEEN), dice, facts)
        draft = (facts.pick(_UNSEEN[chosen][1]) if chosen in _UNSEEN else _TRAINED[chosen])(say)
        caption = _finished(draft, say)
        if len(caption) <= MOST_CHARACTERS and (chosen in _UNSEEN or split_of(caption) == split):
            return Sample(caption, chosen, draft.claims, draft.scene, size)


def prompts(seed: int, n: int, tags: Sequence[str] = TAGS) -> list[Sample]:
    """Draw ``n`` samples of the evaluation split, tag after tag; captions repeat only if a tag has no more."""
    return distinct(sample, seed, n, tags)


def _finished(draft: Draft, say: Speaker) -> str:
    """Put a draft's text into a caption, at times with a beginning, an aside or a truth."""
    dice, text = say.dice, draft.text
    phrases, sentences = asides()
    if draft.form == FRAGMENT:
        if not dice.chance(BARE):
            text = dice.pick(OPENINGS) + text
        return f"{text}, {dice.pick(phrases)}" if dice.chance(ASIDE) else text
    if draft.form != WHOLE:
        text = sentence(text if dice.chance(0.7) else dice.pick(STARTS) + text)
    if dice.chance(TRUTH):
        return f"{sentence(truth(say))} {text}"
    return f"{text} {dice.pick(sentences)}" if dice.chance(ASIDE) else text


@cache
def asides() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the asides that end a phrase, and those that are sentences."""
    lines = (FOLDER / "asides.txt").read_text(encoding="utf-8").splitlines()
    found = [line for line in lines if not line.startswith("#")]
    return tuple(x for x in found if not x.endswith(".")), tuple(x for x in found if x.endswith("."))
