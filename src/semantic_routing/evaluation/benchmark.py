"""The base class of benchmarks: prompts with the skills they test, the layout of images, the summary of scores.

Images have the layout of the benchmark's official tools, so each program can score the other's images. Most benchmarks
have one file per prompt, ``<id>.png``; others override that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from semantic_routing.chat.client import Usage
from semantic_routing.evaluation.listing import list_pictures
from semantic_routing.evaluation.records import CORRECT, Record
from semantic_routing.evaluation.summary import Columns, markdown_table, summarize, tag_columns


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a benchmark."""

    id: str
    """The benchmark's own name for the prompt; digits."""
    text: str
    tags: tuple[str, ...]
    """The skills it tests."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Other facts that the benchmark's scorer needs."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One image to be scored."""

    prompt: Prompt
    index: int
    """Of the prompt."""
    image: int
    """Index of the image among those of its prompt."""
    path: Path
    sha256: str
    """Of the image's file."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A scorer's result for an image."""

    scores: dict[str, float | None]
    """By metric; None without a score."""
    reason: str
    """The reason, in a few words."""
    answer: str = ""
    """A judge's answer, word for word."""


@runtime_checkable
class Scorer(Protocol):
    """Judges images, one after another or several at once."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that affects the scores in JSON types: models with their hashes, templates, thresholds."""
        ...

    @property
    def usage(self) -> Usage | None:
        """Requests to a server so far and their cost; None for a scorer without a server."""
        ...

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        """Yield every task with its finding as soon as it is known, in any order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Prompts, the layout of their images and the columns of the table; by default of verdicts with one tag each."""

    name: ClassVar[str] = ""
    metrics: ClassVar[tuple[str, ...]] = (CORRECT,)
    """Names of the scores that each image gets."""
    headline: ClassVar[tuple[str, str]] = (CORRECT, "overall")
    """Metric and column of the benchmark's single overall number."""

    prompts: tuple[Prompt, ...]
    images_per_prompt: int = 1

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError(f"{self.name} has no prompts")
        if self.images_per_prompt < 1:
            raise ValueError(f"images_per_prompt is {self.images_per_prompt}; it must be at least 1")
        places = [int(prompt.id) for prompt in self.prompts]
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise ValueError(f"two prompts of {self.name} have the id {twice:05d}")

    @property
    def prompt_set(self) -> dict[str, Any]:
        """Return the number of prompts and a hash of their content, equal on every machine."""
        content = json.dumps([astuple(p) for p in self.prompts], ensure_ascii=False, sort_keys=True)
        return {"n": len(self.prompts), "sha256": hashlib.sha256(content.encode()).hexdigest()}

    @property
    def images(self) -> list[tuple[int, int]]:
        """List every image by (prompt index, image index)."""
        return [(p, i) for p in range(len(self.prompts)) for i in range(self.images_per_prompt)]

    @property
    def columns(self) -> Columns:
        """Return the columns of the table."""
        return tag_columns(tag for prompt in self.prompts for tag in prompt.tags)

    def file(self, index: int, image: int) -> str:
        """Return an image's path relative to the images' folder."""
        name = self.prompts[index].id
        return f"{name}.png" if self.images_per_prompt == 1 else f"{name}_{image:02d}.png"

    def sampled(self, index: int, image: int) -> str:
        """Return the path of the PNG that sampling writes, relative to the evaluation's folder."""
        return f"images/{self.file(index, image)}"

    def complete(self, out: Path) -> None:
        """Write the other files of the official layout into ``out/images``, after all images are sampled."""

    def find(self, folder: Path) -> dict[tuple[int, int], Path]:
        """Find the images in a folder by (prompt index, image index); ValueError if it belongs to another benchmark."""
        places = {int(prompt.id): index for index, prompt in enumerate(self.prompts)}
        found: dict[tuple[int, int], Path] = {}
        for path in list_pictures(folder).pictures:
            name, _, image = path.stem.partition("_")
            if not (name.isdecimal() and (image.isdecimal() or not image)):
                continue
            if int(name) not in places:
                raise ValueError(
                    f"{path} belongs to no prompt of {self.name}, whose {len(places)} ids go from {min(places):05d} to "
                    f"{max(places):05d}: these images belong to another set of prompts"
                )
            place = (places[int(name)], int(image or 0))
            if place in found:
                raise ValueError(
                    f"{found[place]} and {path} are both image {place[1]} of prompt {name}; delete one of them"
                )
            found[place] = path
        return found

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return the content of summary.json."""
        return summarize(records, self.columns)

    def table(self, summary: dict[str, Any]) -> str:
        """Return the summary as a Markdown table."""
        return markdown_table(summary)


def checked_rows(rows: Iterable[Any], path: Path, needs: Mapping[str, type], benchmark: str) -> list[dict[str, Any]]:
    """Return the rows; ValueError unless all have the needed keys with values of the needed types.

    A blank text counts as missing.
    """
    checked = []
    for number, row in enumerate(rows, 1):
        values = row if isinstance(row, dict) else {}
        wrong = [
            key
            for key, kind in needs.items()
            if not isinstance(value := values.get(key), kind) or (isinstance(value, str) and not value.strip())
        ]
        if wrong:
            raise ValueError(
                f"{path} holds no prompts of {benchmark}: entry {number} has no {', '.join(wrong)} (it needs "
                f"{', '.join(needs)})"
            )
        checked.append(row)
    return checked
