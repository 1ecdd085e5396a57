"""Questions about captions that a linear probe answers from one token's state: colours, shapes, counts, relations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from semantic_routing.toy.captions import NUMBERS, Sample
from semantic_routing.toy.claims import PLACES, Count, Exists, Kind, Relation
from semantic_routing.toy.words.lexicon import words
from semantic_routing.toy.words.speaker import a
from semantic_routing.toy.worlds import SHAPES, WORDS, WORLDS, World

COLOR_WORDS = Path(__file__).with_name("color_words.txt")
"""Words of things and shades with the colour that people see in them; a line for each colour."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question, asked about many prompts at the same few positions."""

    name: str
    """The question, such as "count"."""
    prompts: list[str]
    answers: list[str]
    """The right answer for each prompt."""
    ends: dict[str, list[int]]
    """The places that a probe reads: by name, the end of the token's characters in each prompt."""
    choices: list[tuple[str, ...]] = field(default_factory=list)
    """The answers that are possible for each prompt; empty if all are."""

    @property
    def chance(self) -> float:
        """Accuracy of a random guess."""
        return 1 / (len(self.choices[0]) if self.choices else len(set(self.answers)))


def world_tasks(world: str, per_task: int, seed: int) -> list[Task]:
    """Return the questions about captions of a world, each with ``per_task`` captions, and those about single words."""
    if world == WORDS:
        return [*word_tasks(per_task, seed), *list_tasks()]
    return [*toy_tasks(per_task, seed), color_word_task()]


def word_tasks(per_task: int, seed: int) -> Iterator[Task]:
    """Yield the questions about captions of the world of words."""
    world = WORLDS[WORDS]
    colors = _captions(seed, "colors", per_task, world)
    kinds = [_exists(one)[0] for one in colors]
    names = _said([_names("shapes", str(kind.shape)) for kind in kinds])
    yield _task("color", colors, [str(kind.color) for kind in kinds], {"noun": names, "last token": _last})
    yield _task("shape", colors, [str(kind.shape) for kind in kinds], {"noun": names, "last token": _last})
    counts = _captions(seed, "counting", per_task, world)
    found = [str(claim.count) for one in counts for claim in one.claims if isinstance(claim, Count)]
    yield _task("count", counts, found, {"last token": _last})
    places = [one for one in _captions(seed, "position", 2 * per_task, world) if isinstance(one.claims[0], Relation)][
        :per_task
    ]
    relations = [claim.where for one in places for claim in one.claims if isinstance(claim, Relation)]
    yield _task("relation", places, relations, {"last token": _last})
    both = _captions(seed, "color_attr", per_task, world)
    for which, name in enumerate(("first", "second")):
        pairs = [tuple(str(kind.color) for kind in _exists(one)) for one in both]
        nouns = _said([_names("shapes", str(_exists(one)[which].shape)) for one in both])
        places_read = {f"{name} noun": nouns, "last token": _last}
        yield _task(f"color of the {name} object", both, [pair[which] for pair in pairs], places_read, pairs)


def list_tasks() -> Iterator[Task]:
    """Yield what colour a thing has and what shape a name means, each word once: a probe is tested on unseen words."""
    for name, question, template in (
        ("things", "color of unseen things", "the color of {}"),
        ("shapes", "shape of unseen names", "a drawing of {}"),
    ):
        known = words(name)
        texts = [word.text if name == "things" else a(word.text) for word in known]
        prompts = [template.format(text) for text in texts]
        ends = {"last token": [len(prompt) for prompt in prompts]}
        yield Task(name=question, prompts=prompts, answers=[word.reading for word in known], ends=ends)


def toy_tasks(per_task: int, seed: int) -> Iterator[Task]:
    """Yield the questions about captions of the toy world, each with ``per_task`` captions."""
    colors = _captions(seed, "colors", per_task)
    kinds = [_exists(one)[0] for one in colors]
    yield _task("color", colors, [str(k.color) for k in kinds], {"noun": _nouns(kinds), "last token": _last})
    yield _task("shape", colors, [str(k.shape) for k in kinds], {"noun": _nouns(kinds), "last token": _last})
    counts = _captions(seed, "counting", per_task)
    found = [claim for one in counts for claim in one.claims if isinstance(claim, Count)]
    words = [NUMBERS[claim.count] for claim in found]
    yield _task("count", counts, words, {"number": _words(words), "last token": _last})
    places = _captions(seed, "position", per_task)
    relations = [claim for one in places for claim in one.claims if isinstance(claim, Relation)]
    where = [claim.where for claim in relations]
    yield _task("relation", places, where, {"relation": _relation(relations), "last token": _last})
    yield from _binding(_captions(seed, "color_attr", per_task))


def _binding(samples: list[Sample]) -> Iterator[Task]:
    """Yield which of a caption's two colours belongs to its first object, and which to its second."""
    pairs = [_exists(one) for one in samples]
    both = [(str(first.color), str(second.color)) for first, second in pairs]
    nouns = [_nouns([pair[i] for pair in pairs]) for i in (0, 1)]
    for which, name in enumerate(("first", "second")):
        places = {"first noun": nouns[0]} if which == 0 else {}
        yield _task(
            f"color of the {name} object", samples, [pair[which] for pair in both],
            places | {"second noun": nouns[1]}, both,
        )  # fmt: skip


def color_word_task(template: str = "the color of {}") -> Task:
    """Return the question which colour a word means, such as scarlet or otter; probes are fitted on others."""
    words, answers = [], []
    for line in COLOR_WORDS.read_text(encoding="utf-8").splitlines():
        color, _, rest = line.partition(":")
        for word in rest.split(","):
            words.append(word.strip())
            answers.append(color)
    prompts = [template.format(word) for word in words]
    ends = {"last token of the word": [prompt.rindex(w) + len(w) for prompt, w in zip(prompts, words, strict=True)]}
    return Task(name="color of unseen words", prompts=prompts, answers=answers, ends=ends)


Place = Callable[[int, str], int]
"""Function from (index, caption) to the end of a position in the caption."""


def _task(
    name: str, samples: Sequence[Sample], answers: list[str], places: dict[str, Place],
    choices: Sequence[tuple[str, ...]] = (),
) -> Task:  # fmt: skip
    captions = [one.caption for one in samples]
    ends = {place: [find(i, caption) for i, caption in enumerate(captions)] for place, find in places.items()}
    return Task(name=name, prompts=captions, answers=answers, ends=ends, choices=list(choices))


def _captions(seed: int, tag: str, count: int, world: World = WORLDS[SHAPES]) -> list[Sample]:
    """Return different captions of a tag."""
    found: dict[str, Sample] = {}
    index = 0
    while len(found) < count and index < 50 * count:
        one = world.sample(seed, index, tag=tag)
        found.setdefault(one.caption, one)
        index += 1
    return list(found.values())


def _exists(one: Sample) -> list[Kind]:
    return [claim.kind for claim in one.claims if isinstance(claim, Exists)]


def _last(index: int, caption: str) -> int:
    return len(caption)


def _words(words: Sequence[str]) -> Place:
    """Find the word of each caption."""
    return lambda index, caption: caption.rindex(words[index]) + len(words[index])


def _names(name: str, reading: str) -> list[str]:
    """Return the words of a list with a given meaning, the longest first."""
    return sorted((word.text for word in words(name) if word.reading == reading), key=len, reverse=True)


def _said(names: Sequence[Sequence[str]]) -> Place:
    """Find the longest of each caption's possible names that it contains as whole words."""

    def find(index: int, caption: str) -> int:
        found = (re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", caption) for name in names[index])
        return next(match.end() for match in found if match is not None)

    return find


def _nouns(kinds: Sequence[Kind]) -> Place:
    return _words([str(kind.shape) for kind in kinds])


def _relation(relations: Sequence[Relation]) -> Place:
    """Find the words for a relation, the longest that the caption contains."""

    def find(index: int, caption: str) -> int:
        said = [words for words in PLACES[relations[index].where] if f" {words} " in caption]
        words = max(said, key=len)
        return caption.rindex(words) + len(words)

    return find
