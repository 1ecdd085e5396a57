"""From verdicts on single images to a table, and the shapes benchmark from a trained model to that table.

An evaluation's folder holds ``images/``, one line for each of them in ``records.jsonl``, ``summary.json``,
``table.md`` and ``manifest.json``, which says what was evaluated and how.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from semantic_routing.checkpoint import write_text
from semantic_routing.config import from_dict
from semantic_routing.data.shapes import GENEVAL_TAGS, TAGS, prompts
from semantic_routing.evaluate.shapes import check
from semantic_routing.generate import Bundle, SampleConfig, claim_folder, request, sample_missing

RECORDS, SUMMARY, TABLE, MANIFEST = "records.jsonl", "summary.json", "table.md", "manifest.json"
SEED_RULE = (
    "prompt i is the i-th of semantic_routing.data.shapes.prompts(seed, n); the noise of its image is a function "
    "of (sampler seed, prompt index, image index) alone"
)
Z95 = 1.959963984540054
"""The standard normal distribution's 0.975 quantile."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The verdict on one image."""

    prompt: int
    """Index of the prompt."""
    image: int
    """Index of the image among those of its prompt."""
    caption: str
    tag: str
    """The skill that the prompt tests."""
    correct: bool
    reason: str
    """Why, in a few words."""
    file: str
    """The image, seen from the evaluation's folder."""


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, the file whole or not at all."""
    write_text(path, "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in records))


def read_records(path: Path) -> list[Record]:
    """Records from JSON lines; ValueError names the file and line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read; give the folder of a finished evaluation") from error
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _record(line: str, where: str) -> Record:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    missing = [f.name for f in fields(Record) if not isinstance(values, dict) or f.name not in values]
    if missing:
        raise ValueError(f"{where} is not a record: it lacks {', '.join(missing)}")
    return from_dict(Record, values, f"{where}: ")


def wilson(correct: float | int, n: float | int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of ``correct`` among ``n`` > 0 independent trials."""
    p = correct / n
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracies with their number of images and 95 % intervals: ``{"accuracy", "n", "interval"}`` by name.

    The names are ``overall`` (the mean over images), ``geneval`` (the unweighted mean of GenEval's six tags,
    only where all six were tested), then every tag. Intervals are Wilson's; that of ``geneval`` takes the
    number of images that would give the same variance if all tags were equally hard: k² / sum(1 / n_k).
    """
    if not records:
        raise ValueError("there are no records to summarize")
    verdicts: dict[str, list[bool]] = {tag: [] for tag in TAGS}
    for record in records:
        verdicts.setdefault(record.tag, []).append(record.correct)
    counts = {tag: (sum(v), len(v)) for tag, v in verdicts.items() if v}
    rows: dict[str, tuple[float, int, tuple[float, float]]] = {}
    for name, (correct, n) in ({"overall": _total(counts.values())} | counts).items():
        rows[name] = (correct / n, n, wilson(correct, n))
        if name == "overall" and all(tag in counts for tag in GENEVAL_TAGS):
            rows["geneval"] = _mean_of_tags([counts[tag] for tag in GENEVAL_TAGS])
    return {
        "accuracy": {name: row[0] for name, row in rows.items()},
        "n": {name: row[1] for name, row in rows.items()},
        "interval": {name: list(row[2]) for name, row in rows.items()},
    }


def _total(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    correct, n = zip(*counts, strict=True)
    return sum(correct), sum(n)


def _mean_of_tags(counts: Sequence[tuple[int, int]]) -> tuple[float, int, tuple[float, float]]:
    mean = sum(correct / n for correct, n in counts) / len(counts)
    effective = len(counts) ** 2 / sum(1 / n for _, n in counts)
    return mean, _total(counts)[1], wilson(mean * effective, effective)


def markdown_table(summary: dict[str, Any]) -> str:
    """A summary as a Markdown table with a row for each accuracy."""
    lines = ["| | accuracy | 95 % interval | images |", "| --- | ---: | :---: | ---: |"]
    for name, accuracy in summary["accuracy"].items():
        low, high = summary["interval"][name]
        lines.append(f"| {name} | {accuracy:.3f} | {low:.3f} to {high:.3f} | {summary['n'][name]} |")
    return "\n".join(lines) + "\n"


def evaluate_shapes(bundle: Bundle, out: Path, *, n: int, seed: int, cfg: SampleConfig) -> dict[str, Any]:
    """Sample one image for each of ``n`` unseen captions of the toy world, check them exactly; the summary.

    ``seed`` decides the prompts, ``cfg.seed`` the noise. Images that are already in ``out`` are kept, so that a
    stopped evaluation goes on; ValueError if they belong to another model, sampler or set of prompts.
    """
    samples = prompts(seed, n)
    captions = [sample.caption for sample in samples]
    facts = {"checkpoint": None if bundle.checkpoint is None else str(bundle.checkpoint), "bf16": bundle.bf16}
    claim_folder(
        out, request(bundle, captions, cfg), benchmark="shapes", prompt_seed=seed, seed_rule=SEED_RULE, **facts
    )
    files = [f"images/{index:05d}.png" for index in range(n)]
    sample_missing(bundle, captions, {(index, 0): out / file for index, file in enumerate(files)}, cfg)
    records = []
    for index, (sample, file) in enumerate(zip(samples, tqdm(files, desc="Checking", unit="image"), strict=True)):
        verdict = check(np.asarray(Image.open(out / file).convert("RGB")), sample.claims)
        records.append(
            Record(
                prompt=index,
                image=0,
                caption=sample.caption,
                tag=sample.tag,
                correct=verdict.correct,
                reason=verdict.reason,
                file=file,
            )
        )
    summary = summarize(records)
    write_records(out / RECORDS, records)
    write_text(out / SUMMARY, json.dumps(summary, indent=2) + "\n")
    write_text(out / TABLE, markdown_table(summary))
    return summary
