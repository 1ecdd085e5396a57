"""Hugging Face's split names: leaves out ``test`` and ``validation`` files that are next to ``train`` files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from semantic_routing.common.images.formats import picture_endings

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of each split's folders and shards, alone or before one of ``-._``, a space or a digit."""
SHARDS = (".tar", ".parquet")
"""Endings of files whose own names may name a split; a picture's name never does."""
_SPLIT = {word: split for split, words in WORDS.items() for word in words}
_NAME = re.compile(rf"({'|'.join(sorted(_SPLIT, key=len, reverse=True))})(?=$|[-._ 0-9])", re.IGNORECASE)


def without_other_splits(folder: str, paths: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """Return the paths of the split ``train`` or of no split, and counts of the other splits' pictures and shards.

    The counts are by the path that selects them. A name counts as another split's only if the same folder also has a
    name of ``train``.
    """
    paths = list(paths)
    places = [_names(folder, path) for path in paths]
    trains = {base for names in places for base, name, split in names if split == "train"}
    kept: list[str] = []
    others: Counter[str] = Counter()
    for path, names in zip(paths, places, strict=True):
        left_out = next((base + name for base, name, split in names if split != "train" and base in trains), "")
        if not left_out:
            kept.append(path)
        elif path.lower().endswith((*picture_endings(), *SHARDS)):  # captions are not counted
            others[left_out] += 1
    return kept, others


def _names(folder: str, path: str) -> list[tuple[str, str, str]]:
    """Return for each part of a path that names a split: the path before it, the pattern that selects it, the split."""
    base = folder.rstrip("/") + "/"
    found = []
    *folders, file = path[len(base) :].split("/")
    for name in folders:
        if match := _NAME.match(name):
            found.append((base, name, _SPLIT[match[1].lower()]))
        base += f"{name}/"
    if file.lower().endswith(SHARDS) and (match := _NAME.match(file)):
        found.append((base, f"{match[1]}*{file[file.rfind('.') :]}", _SPLIT[match[1].lower()]))
    return found
