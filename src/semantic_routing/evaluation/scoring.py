"""Scoring a folder of images: resumable by image, shared among processes, every score traceable.

Findings are appended, line by line, to ``records.part-NN.jsonl``, one file for each process, so that a crash loses at
most the image in progress. At the end they become ``records.jsonl``, complete and in order. An image is identified by
the hash of its file, so an image that was replaced is scored again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from semantic_routing.common.distributed import Processes
from semantic_routing.common.files import write_text
from semantic_routing.common.images.decode import BROKEN
from semantic_routing.common.images.formats import formats
from semantic_routing.evaluation.benchmark import Benchmark, Finding, Scorer, Task
from semantic_routing.evaluation.page import page
from semantic_routing.evaluation.records import (
    MANIFEST,
    MISSING,
    PAGE,
    RECORDS,
    SUMMARY,
    TABLE,
    UNREADABLE,
    UNSCORED,
    Record,
    parse_record,
    reason_note,
    record_line,
    scorer_name,
    unscored,
    write_records,
)
from semantic_routing.evaluation.summary import without_nan

PART = re.compile(r"records\.part-\d{2,}\.jsonl")
WHEREABOUTS = ("base_url", "versions")
"""Keys of an identity that do not change scores: the judge's address, the client's version."""
Place = tuple[int, int]
"""An image by (prompt index, image index)."""


def check_scorer(benchmark: Benchmark, out: Path, identity: dict[str, Any], *, rescore: bool, job: Processes) -> None:
    """Raise ValueError if ``out`` holds scores of another scorer, or verdicts on other prompts.

    A scorer that scored nothing is ignored, because its settings may have been wrong. With ``rescore`` they are
    deleted instead.
    """
    if job.first:
        written = [*_parts(out), *out.glob(RECORDS)]
        manifest = read_manifest(out / MANIFEST)
        earlier, prompts = manifest.get("scorer"), manifest.get("prompt_set")
        if written and earlier is None:
            raise ValueError(f"{written[0]} already exists and does not belong to an evaluation; choose another --out")
        if rescore:
            for path in written:
                path.unlink()
            written = []
        scored = any(_is_scored(record) for record in _read(written))
        if scored and not same_scorer(earlier, identity):
            raise ValueError(
                f"{out} was scored, at least in part, by {scorer_name(earlier)}, not by {scorer_name(identity)} "
                f"({_difference(earlier, identity)}); choose another --out, or give --rescore to score all of it again"
            )
        elif scored and any(prompt.metadata for prompt in benchmark.prompts) and prompts != benchmark.prompt_set:
            raise ValueError(
                f"{out} was scored, at least in part, for another set of prompts; choose another --out, or give "
                "--rescore to score all of it again"
            )
    job.wait()


def score_folder(
    benchmark: Benchmark, images: Path, out: Path, scorer: Scorer, facts: dict[str, Any], job: Processes
) -> dict[str, Any]:
    """Score the images, write all results to ``out``, and return the summary.

    Earlier scores are kept; images without a score are tried again. ``facts`` is the manifest. Raises ValueError if
    there is no image, or if no image could be scored.
    """
    found = benchmark.find(images)
    if not found:
        raise ValueError(
            f"{images} holds no image of {benchmark.name}; the first is expected at {images / benchmark.file(0, 0)}"
        )
    files = {
        place: Path(os.path.relpath(found.get(place, images / benchmark.file(*place)), out)).as_posix()
        for place in sorted({*benchmark.images, *found})
    }
    kept = _earlier(benchmark, out, facts, job)
    share = job.share(list(files))
    with (
        _part(out, job.rank).open("a", encoding="utf-8") as file,
        tqdm(total=len(share), desc="Scoring", unit="image", disable=not job.first) as bar,
    ):
        tasks = []
        for place in share:
            opened = _open(benchmark, place, found.get(place))
            if isinstance(opened, Task) and _is_of(kept.get(place), opened):
                bar.update()
            elif isinstance(opened, Task):
                tasks.append(opened)
            else:
                file.write(record_line(_record(benchmark, place, files[place], opened)))
                bar.update()
        for task, finding in scorer.score(tasks) if tasks else ():
            place = (task.index, task.image)
            file.write(record_line(_record(benchmark, place, files[place], finding, task.sha256)))
            file.flush()
            bar.update()
    job.wait()
    return _finish(benchmark, out, facts, files) if job.first else {}


def _earlier(benchmark: Benchmark, out: Path, facts: dict[str, Any], job: Processes) -> dict[Place, Record]:
    """Gather the records of earlier processes in one file, beside the manifest; return those that are kept."""
    if job.first:
        parts = _parts(out)
        kept = _kept(benchmark, [*out.glob(RECORDS), *parts])
        write_text(out / MANIFEST, json.dumps(facts, indent=2) + "\n")
        write_records(_part(out, 0), kept.values())
        for path in set(parts) - {_part(out, 0)}:
            path.unlink()
    job.wait()
    kept = _kept(benchmark, [_part(out, 0)])
    job.wait()  # until all have read it
    return kept


def _finish(benchmark: Benchmark, out: Path, facts: dict[str, Any], files: dict[Place, str]) -> dict[str, Any]:
    """Write the results in order and return the summary."""
    by_place = {(r.prompt, r.image): r for r in _read(_parts(out))}
    lost = files.keys() - by_place.keys()
    if lost:
        raise ValueError(
            f"{len(lost)} images were given to the scorer but got no result, such as {min(lost)}; run it again"
        )
    if not any(_is_scored(record) for record in by_place.values()):
        first = min(by_place.values(), key=lambda r: ((UNSCORED, UNREADABLE, MISSING).index(r.gap), r.prompt, r.image))
        raise ValueError(
            f"none of {len(files)} images could be scored; the first: {first.reason}; fix that and repeat the command "
            f"(all reasons: {_part(out, 0)})"
        )
    # Scores stay where an image moved, or where a prompt is counted for other skills.
    records = [
        replace(by_place[place], file=file, tags=benchmark.prompts[place[0]].tags) for place, file in files.items()
    ]
    summary = without_nan(benchmark.summarize(records))
    chosen = benchmark.prompt_set
    table = f"{benchmark.table(summary)}{reason_note(unscored(records))}\n" + (
        f"{chosen['n']} prompts, {len(records)} images, scored by {scorer_name(facts['scorer'])}; SHA-256 of the "
        f"prompt set {chosen['sha256']}.\n"
    )
    write_records(out / RECORDS, records)
    write_text(out / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    write_text(out / TABLE, table)
    write_text(out / PAGE, page(benchmark.name, table, records, facts))
    for path in _parts(out):
        path.unlink()
    return summary


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest; empty if there is none, ValueError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged; delete it or choose another --out") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a manifest; choose another --out")
    return found


def _open(benchmark: Benchmark, place: Place, path: Path | None) -> Task | tuple[str, str]:
    """Return the task of a readable image, or the kind of missing score and its reason."""
    if path is None:
        return MISSING, "there is no image"
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            image.load()
    except BROKEN as error:
        return UNREADABLE, f"the image cannot be opened ({type(error).__name__})"
    index, number = place
    return Task(
        prompt=benchmark.prompts[index],
        index=index,
        image=number,
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _is_scored(record: Record) -> bool:
    """Return True if a record has a score of any metric."""
    return any(score is not None for score in record.scores.values())


def _is_of(record: Record | None, task: Task) -> bool:
    """Return True if an earlier record is complete and of this image."""
    return record is not None and record.sha256 == task.sha256 and not record.gap


def _record(
    benchmark: Benchmark, place: Place, file: str, finding: Finding | tuple[str, str], sha256: str = ""
) -> Record:
    """Return the record of a finding, or of a missing score and its reason."""
    index, number = place
    prompt = benchmark.prompts[index]
    if isinstance(finding, Finding):
        scores, reason, answer = finding.scores, finding.reason, finding.answer
        gap = UNSCORED if any(scores.get(metric) is None for metric in benchmark.metrics) else ""
    else:
        scores, (gap, reason), answer = dict.fromkeys(benchmark.metrics), finding, ""
    return Record(
        prompt=index,
        id=prompt.id,
        image=number,
        caption=prompt.text,
        tags=prompt.tags,
        file=file,
        scores=scores,
        reason=reason,
        answer=answer,
        gap=gap,
        sha256=sha256,
    )


def _kept(benchmark: Benchmark, paths: Iterable[Path]) -> dict[Place, Record]:
    """Return earlier records by place, without unscored ones and those of other prompts."""
    return {
        (r.prompt, r.image): r
        for r in _read(paths)
        if not r.gap and r.prompt < len(benchmark.prompts) and r.caption == benchmark.prompts[r.prompt].text
    }


def _read(paths: Iterable[Path]) -> list[Record]:
    """Read the records of several files, without a last line that a crash cut off."""
    records = []
    for path in paths:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines[:-1], 1):
            records.append(parse_record(line, f"{path}, line {number}"))
        with suppress(ValueError):
            records += [parse_record(lines[-1], "")] if lines[-1] else []
    return records


def _parts(out: Path) -> list[Path]:
    """List the files of all processes that have scored."""
    return sorted(path for path in out.glob("records.part-*.jsonl") if PART.fullmatch(path.name))


def _part(out: Path, rank: int) -> Path:
    return out / f"records.part-{rank:02d}.jsonl"


def same_scorer(one: Any, other: Any) -> bool:
    """Return True if two identities are of one scorer, on any machine."""
    return isinstance(one, dict) and isinstance(other, dict) and not _differing(one, other)


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name) and name not in WHEREABOUTS]


def _difference(earlier: Any, identity: dict[str, Any]) -> str:
    return f"they differ in {', '.join(_differing(earlier if isinstance(earlier, dict) else {}, identity))}"
