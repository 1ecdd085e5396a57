"""A draft: a text, the claims that it makes, and a scene in which they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from semantic_routing.toy.claims import Claim
from semantic_routing.toy.scenes import Scene
from semantic_routing.toy.words.speaker import Speaker

FRAGMENT, SENTENCE, WHOLE = "fragment", "sentence", "whole"


@dataclass(frozen=True)
class Draft:
    """A text, its claims, and a scene in which they hold."""

    text: str
    claims: tuple[Claim, ...]
    scene: Scene
    form: str = FRAGMENT
    """``FRAGMENT`` for a noun phrase, ``SENTENCE`` for a clause, ``WHOLE`` for finished sentences."""


Drafting = Callable[[Speaker], Draft]
"""A tag's function: it chooses kinds, claims and words; what the text does not mention is random."""
