"""The generated worlds, by name: what each offers to training, evaluation and analysis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from semantic_routing.toy import captions
from semantic_routing.toy.captions import Sample
from semantic_routing.toy.words import captions as word_captions

SHAPES, WORDS = "shapes", "words"


@runtime_checkable
class Draw(Protocol):
    """A world's function from (seed, index) to a sample."""

    def __call__(
        self, seed: int, index: int, *, split: str = ..., tag: str | None = ..., size: int = ...
    ) -> Sample: ...


@runtime_checkable
class Ask(Protocol):
    """A world's function from a seed to prompts of its evaluation split."""

    def __call__(self, seed: int, n: int, tags: Sequence[str] = ...) -> list[Sample]: ...


@dataclass(frozen=True, kw_only=True)
class World:
    """An unlimited set of images with captions that are checked exactly."""

    title: str
    """Its name in sentences."""
    sample: Draw
    prompts: Ask
    """Unseen captions, spread evenly over the tags."""
    tags: tuple[str, ...]
    trained_tags: tuple[str, ...]
    """The tags of training; the others have held-out words."""


WORLDS = {
    SHAPES: World(
        title="the toy world", sample=captions.sample, prompts=captions.prompts,
        tags=captions.TAGS, trained_tags=captions.TAGS,
    ),
    WORDS: World(
        title="the world of words", sample=word_captions.sample, prompts=word_captions.prompts,
        tags=word_captions.TAGS, trained_tags=word_captions.TRAINED_TAGS,
    ),
}  # fmt: skip
"""Every world by its name in ``data.paths``; a folder of such a name is ``./shapes``."""


def world_of(config: Mapping[str, Any], paths: Sequence[str] = ()) -> str:
    """Return the name of the world among ``paths``, or else in the data of a run; an empty string if there is none."""
    names = paths or config.get("data", {}).get("paths", ())
    return next((name for name in names if name in WORLDS), "")
