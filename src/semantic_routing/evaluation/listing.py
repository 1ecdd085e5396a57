"""The images in a folder, and the number of its files that are skipped, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

from semantic_routing.common.images.formats import formats

APPLE, HIDDEN, BROKEN_LINK = "AppleDouble (._ files of macOS)", "hidden", "broken links"


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images in a folder and its skipped files."""

    folder: Path
    pictures: tuple[Path, ...]
    """By name."""
    passed_over: Mapping[str, int]
    """Skipped files by reason, such as ``{".json": 2}``."""

    def __str__(self) -> str:
        """Describe the skipped files; empty if there is none."""
        return ", ".join(f"{count} {reason}" for reason, count in self.passed_over.items())


@lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """Return all suffixes, such as .png, of the picture files that are opened."""
    known = formats()  # first, for this may register another format
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


def list_pictures(folder: Path, *, below: bool = False) -> Listing:
    """List the pictures directly in a folder, or also those in the folders below it; ValueError if there is none."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder of images {folder}")
    return _sorted_out(folder, folder.rglob("*") if below else folder.iterdir())


def _sorted_out(folder: Path, paths: Iterable[Path]) -> Listing:
    pictures, passed = [], Counter[str]()
    for path in sorted(paths):
        if path.is_dir():
            continue
        reason = _reason(path, path.relative_to(folder))
        if reason:
            passed[reason] += 1
        else:
            pictures.append(path)
    return Listing(folder=folder, pictures=tuple(pictures), passed_over=dict(sorted(passed.items())))


def _reason(path: Path, inside: Path) -> str:
    """Return the reason to skip a file; empty for a picture."""
    if path.name.startswith("._") or "__MACOSX" in inside.parts:
        return APPLE
    if any(part.startswith(".") for part in inside.parts):
        return HIDDEN
    if not path.is_file():
        return BROKEN_LINK
    suffix = path.suffix.lower()
    return "" if suffix in suffixes() else suffix or "without a suffix"
