"""GenAI-Bench (Li et al., 2024) with VQAScore (Lin et al., 2024), aggregated as t2v_metrics does.

The score of a prompt counts for every skill that ``genai_skills.json`` lists it under. Its lists hold integer ids,
which start at 1 in the set of 527 prompts and at 0 in that of 1600.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from pathlib import Path
from typing import Any, ClassVar, SupportsFloat

from PIL import Image

from semantic_routing.common.files import read_json, written_whole
from semantic_routing.evaluation.benchmark import Benchmark, Prompt, checked_rows
from semantic_routing.evaluation.records import Record
from semantic_routing.evaluation.summary import Columns, gaps, scores_table, spread

VQASCORE = "vqascore"
ALL = "all"
"""The column over every prompt that has a skill."""
SKILLS = (
    "basic", "attribute", "scene", "spatial relation", "action relation", "part relation",
    "advanced", "counting", "comparison", "differentiation", "negation", "universal",
)  # fmt: skip
"""In the order of the official tables; basic and advanced have their own lists of ids."""
JPEG_QUALITY = 95
UNTAGGED_SHARE = 0.1
"""If more of the prompts than this have no skill, the skills are taken for those of another set."""


def aggregate(
    scores: Mapping[str, SupportsFloat | None] | Mapping[int, SupportsFloat | None],
    skills: Mapping[str, Sequence[int]],
) -> dict[str, dict[str, Any]]:
    """Return mean, unbiased standard deviation and n, ``{"mean", "std", "n"}``, for each skill and ``all``.

    ``scores`` maps prompts' ids, such as "00012" or "12", to scores. A score of nan or None, or a missing id, counts as
    a missing score, and n is the number of scored prompts. ``all`` is over the union of the skills' ids. The mean of no
    score and the deviation of fewer than two are nan. Raises ValueError if the ids are not those of the skills: some of
    the skills' ids have no score while other ids have one, as when one side counts from 0 and the other from 1.
    """
    known = _by_number(scores)
    tagged = sorted({int(number) for numbers in skills.values() for number in numbers})
    if not known or not tagged:
        raise ValueError("there is nothing to aggregate: " + ("no scores" if tagged else "no skills have ids"))
    absent, foreign = [n for n in tagged if n not in known], known.keys() - set(tagged)
    if absent and (foreign or len(absent) == len(tagged)):
        raise ValueError(
            f"the scores' ids ({min(known)} to {max(known)}) do not match the skills' ({tagged[0]} to {tagged[-1]}): "
            f"{len(absent)} tagged ids have no score, such as {absent[0]}, and {len(foreign)} scored ids no skill; use "
            "the genai_skills.json of the same set of prompts, and nan for a tagged prompt that was not scored"
        )
    by_skill = {name: [known.get(int(number), nan) for number in numbers] for name, numbers in skills.items()}
    by_skill[ALL] = [known.get(number, nan) for number in tagged]
    return {name: spread([v for v in values if not isnan(v)]) for name, values in by_skill.items()}


def _by_number(scores: Mapping[Any, SupportsFloat | None]) -> dict[int, float]:
    """Return scores by the number of their prompt."""
    found: dict[int, float] = {}
    for key, score in scores.items():
        if not str(key).isdecimal():
            raise ValueError(f"{key!r} is not the id of a prompt; ids are digits, such as 00012")
        if int(key) in found:
            raise ValueError(f"prompt {int(key):05d} has two scores")
        found[int(key)] = nan if score is None else float(score)
    return found


@dataclass(frozen=True, kw_only=True)
class GenAIBench(Benchmark):
    """Prompts with their skills; one image a prompt, ``<id>.jpeg``."""

    name: ClassVar[str] = "genai-bench"
    metrics: ClassVar[tuple[str, ...]] = (VQASCORE,)
    headline: ClassVar[tuple[str, str]] = (VQASCORE, ALL)

    @property
    def columns(self) -> Columns:
        there = dict.fromkeys(tag for prompt in self.prompts for tag in prompt.tags)
        skills = tuple(sorted(there, key=lambda name: SKILLS.index(name) if name in SKILLS else len(SKILLS)))
        return {ALL: (skills,)} | {name: ((name,),) for name in skills}

    def file(self, index: int, image: int) -> str:
        return str(Path(super().file(index, image)).with_suffix(".jpeg"))

    def sampled(self, index: int, image: int) -> str:
        """Return the path of the lossless image, outside of the official layout."""
        return f"originals/{super().file(index, image)}"

    def complete(self, out: Path) -> None:
        """Write the JPEGs of the official layout."""
        for place in self.images:
            with (
                Image.open(out / self.sampled(*place)) as image,
                written_whole(out / "images" / self.file(*place)) as to,
            ):
                image.convert("RGB").save(to, format="JPEG", quality=JPEG_QUALITY, subsampling=0)

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        """Aggregate as the official tools do; several images of a prompt count by their mean."""
        by_id: dict[str, list[float]] = {prompt.id: [] for prompt in self.prompts if prompt.tags}
        for record in records:
            score = record.scores.get(VQASCORE)
            if score is not None and record.id in by_id:
                by_id[record.id].append(score)
        means = {name: spread(values)["mean"] for name, values in by_id.items()}
        skills = {name: [int(p.id) for p in self.prompts if name in p.tags] for name in self.columns if name != ALL}
        found = aggregate(means, skills)
        return {"scores": {VQASCORE: {ALL: found.pop(ALL)} | found}, "gaps": gaps(records, self.metrics)}

    def table(self, summary: dict[str, Any]) -> str:
        return scores_table(summary)


def read_genai_bench(prompts: Path, skills: Path, images_per_prompt: int = 1) -> GenAIBench:
    """Read the official files ``genai_image.json`` and ``genai_skills.json`` of one set.

    Raises ValueError if a file does not have this form, or if the two belong to different sets.
    """
    content = read_json(prompts, "the prompts of GenAI-Bench")
    if isinstance(content, dict):
        content = [{**row, "id": key} if isinstance(row, dict) else row for key, row in content.items()]
    rows = checked_rows(
        content if isinstance(content, list) else [content], prompts, {"id": str, "prompt": str}, "GenAI-Bench"
    )
    wrong = [row["id"] for row in rows if not row["id"].isdecimal()]
    if wrong:
        raise ValueError(
            f"{prompts} holds no prompts of GenAI-Bench: {wrong[0]!r} is not the id of a prompt; ids are digits, "
            "such as 00012"
        )
    tagged = _read_skills(skills)
    tags = {
        number: [name for name, ids in tagged.items() if number in ids] for number in {int(row["id"]) for row in rows}
    }
    unknown = sorted(set().union(*tagged.values()) - tags.keys())
    untagged = sum(not names for names in tags.values())
    if unknown or untagged > UNTAGGED_SHARE * len(tags):
        what = (
            f"it lists {len(unknown)} ids that are not prompts, such as {unknown[0]}"
            if unknown
            else (f"{untagged} of {len(tags)} prompts have no skill")
        )
        raise ValueError(
            f"{skills} is not of the same set as {prompts}, whose ids go from {min(tags)} to {max(tags)}: {what}; the "
            "set of 527 prompts counts from 1, that of 1600 from 0"
        )
    return GenAIBench(
        prompts=tuple(
            Prompt(id=f"{int(row['id']):05d}", text=row["prompt"], tags=tuple(tags[int(row["id"])])) for row in rows
        ),
        images_per_prompt=images_per_prompt,
    )


def _read_skills(path: Path) -> dict[str, set[int]]:
    """Read the ids of every skill."""
    found = read_json(path, "the skills of GenAI-Bench")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path} is not genai_skills.json: it must be an object of lists of ids by skill")
    for name, ids in found.items():
        if not isinstance(ids, list) or not all(type(number) is int for number in ids):
            raise ValueError(f"{path} is not genai_skills.json: {name!r} is not a list of whole numbers")
    return {name: set(ids) for name, ids in found.items() if name != ALL}
