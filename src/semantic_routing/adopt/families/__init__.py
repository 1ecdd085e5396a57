"""The table of families: the pipelines that can be adopted, one entry of about a dozen lines each."""

from __future__ import annotations

from typing import Any

from semantic_routing.adopt.families import own, read, slot, stream
from semantic_routing.adopt.families.family import Blocks, Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (own.OWN, *read.FAMILIES, *stream.FAMILIES, *slot.FAMILIES)
}

__all__ = ["FAMILIES", "Blocks", "Family", "find_family"]


def find_family(transformer: Any) -> Family:
    """Return the family of a transformer; raise ValueError, which lists the known ones, for an unknown class."""
    name = type(transformer).__name__
    for family in FAMILIES.values():
        if family.transformer == name:
            return family
    known = ", ".join(sorted(family.transformer for family in FAMILIES.values()))
    raise ValueError(f"adopt does not know the transformer {name}; known: {known}")
