"""GenEval's prompts and folders (Ghosh et al., 2023); ``verdict.py`` gives the verdicts.

Images are in ``<digits>/samples/<digits>.png`` with the prompt in ``<digits>/metadata.jsonl``; the official
generator writes five digits, its documentation four, and any number of them is read here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from semantic_routing.common.errors import BadData
from semantic_routing.common.files import read_json, read_json_lines, write_text
from semantic_routing.evaluation.benchmark import Benchmark, Finding, Prompt, Task
from semantic_routing.evaluation.geneval.verdict import ColorClassifier, Detector, check_metadata, score_image
from semantic_routing.evaluation.listing import list_pictures
from semantic_routing.evaluation.records import CORRECT, Record
from semantic_routing.evaluation.summary import Columns, markdown_table, summarize, tag_columns

IMAGES_PER_PROMPT = 4
METADATA = "metadata.jsonl"


@dataclass(frozen=True, kw_only=True)
class GenEval(Benchmark):
    """Prompts with the objects that they ask for."""

    name: ClassVar[str] = "geneval"

    images_per_prompt: int = IMAGES_PER_PROMPT

    @property
    def columns(self) -> Columns:
        """Return the columns: ``overall`` is the official score, the plain mean of the tags' accuracies."""
        tags = tuple(dict.fromkeys(tag for prompt in self.prompts for tag in prompt.tags))
        by_tag = tag_columns(tags)
        return {"overall": tuple((tag,) for tag in tags), "images": (tags,)} | {tag: by_tag[tag] for tag in tags}

    def file(self, index: int, image: int) -> str:
        return f"{index:05d}/samples/{image:05d}.png"

    def complete(self, out: Path) -> None:
        """Write every prompt's metadata beside its images."""
        for index, prompt in enumerate(self.prompts):
            write_text(out / "images" / f"{index:05d}" / METADATA, json.dumps(prompt.metadata) + "\n")

    def find(self, folder: Path) -> dict[tuple[int, int], Path]:
        """Find all images in the folders of prompts; ValueError if a folder belongs to no prompt.

        As in the official scorer, a folder's prompt is the one in its metadata; without metadata it is the prompt with
        the folder's number.
        """
        if not folder.is_dir():
            raise ValueError(f"there is no folder of images {folder}")
        by_text = {prompt.text: index for index, prompt in enumerate(self.prompts)}
        found: dict[tuple[int, int], Path] = {}
        for place in sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()):
            index = self._index(place, by_text)
            for path in list_pictures(place / "samples").pictures if (place / "samples").is_dir() else ():
                if not path.stem.isdecimal():
                    continue
                image = index, int(path.stem)
                if image in found:
                    raise ValueError(
                        f"{found[image]} and {path} are both image {image[1]} of the same prompt; delete one of them"
                    )
                found[image] = path
        return found

    def _index(self, place: Path, by_text: Mapping[str, int]) -> int:
        """Return the index of a folder's prompt; ValueError if this benchmark has no such prompt."""
        index, metadata = int(place.name), place / METADATA
        asked = read_json(metadata, "the metadata of a prompt") if metadata.is_file() else None
        if isinstance(asked, dict):
            text = asked.get("prompt")
            if index < len(self.prompts) and text == self.prompts[index].text:
                return index
            if not isinstance(text, str) or text not in by_text:
                raise ValueError(
                    f"{metadata} asks for {text!r}, which is not a prompt of this benchmark: these images belong to "
                    "another set of prompts"
                )
            return by_text[text]
        if index >= len(self.prompts):
            raise ValueError(f"{place} belongs to no prompt: there are {len(self.prompts)}, counted from 0")
        return index

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        """Return accuracies, and as ``correct_prompts`` the share of prompts with at least one correct image."""
        verdicts: dict[int, list[bool]] = {}
        for record in records:
            if record.correct is not None:
                verdicts.setdefault(record.prompt, []).append(record.correct)
        solved = sum(map(any, verdicts.values())) / len(verdicts) if verdicts else None
        return summarize(records, self.columns) | {"correct_prompts": solved, "prompts": len(verdicts)}

    def table(self, summary: dict[str, Any]) -> str:
        solved = summary["correct_prompts"]
        note = "" if solved is None else f"\nPrompts with a correct image: {solved:.3f} of {summary['prompts']}.\n"
        return markdown_table(summary) + note


def read_geneval(path: Path, images_per_prompt: int = IMAGES_PER_PROMPT) -> GenEval:
    """Read the official ``evaluation_metadata.jsonl``; ValueError for prompts of another benchmark."""
    rows = read_json_lines(path, "the prompts of GenEval")
    for number, row in enumerate(rows, 1):
        try:
            check_metadata(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is not a prompt of GenEval: {error}") from error
    return GenEval(
        prompts=tuple(
            Prompt(id=f"{index:05d}", text=row["prompt"], tags=(row["tag"],), metadata=row)
            for index, row in enumerate(rows)
        ),
        images_per_prompt=images_per_prompt,
    )


@dataclass(frozen=True, kw_only=True)
class GenEvalScorer:
    """The verdicts of ``verdict.py`` as a scorer; its answers are the detections that determined them."""

    detector: Detector
    colors: ColorClassifier
    variant: str = ""
    """The user's own label of the score, beside those of the models."""

    usage = None

    @property
    def identity(self) -> dict[str, Any]:
        found, named = self.detector.identity, self.colors.identity
        label = f"detector {found.get('label')}, colours {named.get('label')}"
        return {
            "scorer": "geneval",
            "label": ", ".join(filter(None, (self.variant, label))),
            "detector": found,
            "colors": named,
        }

    def score(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Finding]]:
        for task in tasks:
            yield task, self._find(task)

    def _find(self, task: Task) -> Finding:
        try:
            with Image.open(task.path) as image:
                found = score_image(image, task.prompt.metadata, self.detector, self.colors)
        except BadData as error:
            return Finding(scores={CORRECT: None}, reason=str(error))
        return Finding(
            scores={CORRECT: float(found["correct"])},
            reason=found["reason"] or "everything asked for was found",
            answer=json.dumps(found["detections"]),
        )
