"""Splits as Hugging Face names them: beside ``train``, what is called ``test`` or ``validation`` is not trained on."""

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
"""What folders and shards of each split are called, alone or before one of ``-._``, a space or a number."""
SHARDS = (".tar", ".parquet")
"""Files whose own names may be those of splits; pictures are called anything."""
_SPLIT = {word: split for split, words in WORDS.items() for word in words}
_NAME = re.compile(rf"({'|'.join(sorted(_SPLIT, key=len, reverse=True))})(?=$|[-._ 0-9])", re.IGNORECASE)


def without_other_splits(folder: str, paths: Iterable[str]) -> tuple[list[str], Counter[str]]:
    """The paths below a folder that are of the split ``train`` or of none, and how many pictures and shards of
    others, by what takes them.

    A name counts as that of another split only beside one of ``train``, in the same folder.
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
        elif path.lower().endswith((*picture_endings(), *SHARDS)):  # captions belong to these
            others[left_out] += 1
    return kept, others


def _names(folder: str, path: str) -> list[tuple[str, str, str]]:
    """Of each part of a path below the folder that names a split: what stands before it, what takes it, the split."""
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
