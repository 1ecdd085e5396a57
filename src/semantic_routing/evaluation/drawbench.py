"""DrawBench's prompts (Saharia et al., 2022), scored by UnifiedReward (Wang et al., 2025)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from semantic_routing.common.files import read_json, read_json_lines, read_text
from semantic_routing.evaluation.benchmark import Benchmark, Prompt, checked_rows
from semantic_routing.evaluation.records import Record
from semantic_routing.evaluation.summary import Columns, gaps, grouped, scores_table, spread

ASPECTS = ("alignment", "coherence", "style")
"""The aspects that UnifiedReward scores, each from 1 to 5; the paper reports style."""
OVERALL = "overall"


@dataclass(frozen=True, kw_only=True)
class DrawBench(Benchmark):
    """Prompts with their category; one image a prompt, ``<five digits>.png``."""

    name: ClassVar[str] = "drawbench"
    metrics: ClassVar[tuple[str, ...]] = ASPECTS
    headline: ClassVar[tuple[str, str]] = ("style", OVERALL)

    @property
    def columns(self) -> Columns:
        categories = list(dict.fromkeys(tag for prompt in self.prompts for tag in prompt.tags))
        return {OVERALL: (tuple(categories),)} | {name: ((name,),) for name in categories}

    def summarize(self, records: Sequence[Record]) -> dict[str, Any]:
        """Average the answers that could be parsed; ``gaps`` counts the others."""
        scores = {
            metric: {name: spread(grouped(records, column, metric)[0]) for name, column in self.columns.items()}
            for metric in self.metrics
        }
        return {"scores": scores, "gaps": gaps(records, self.metrics)}

    def table(self, summary: dict[str, Any]) -> str:
        return scores_table(summary)


def read_drawbench(path: Path, images_per_prompt: int = 1) -> DrawBench:
    """Read a CSV file with the columns Prompts and Category, or JSON or JSON lines with such keys.

    Ids count from 0 in the file's order. Raises ValueError if a row lacks either.
    """
    what, suffix = "the prompts of DrawBench", path.suffix.lower()
    if suffix == ".csv":
        try:
            rows: Any = list(csv.DictReader(io.StringIO(read_text(path, what), newline=""), strict=True))
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV: {error}") from error
    else:
        rows = read_json_lines(path, what) if suffix == ".jsonl" else read_json(path, what)
    if not isinstance(rows, list):
        raise ValueError(
            f"{path} holds no prompts of DrawBench: it must be a list of objects, not {json.dumps(rows)[:40]}"
        )
    plain = [
        {str(key).strip().lower(): value for key, value in row.items()} if isinstance(row, dict) else row
        for row in rows
    ]
    named = [row | {"prompt": row.get("prompts", row.get("prompt"))} if isinstance(row, dict) else row for row in plain]
    checked = checked_rows(named, path, {"prompt": str, "category": str}, "DrawBench")
    return DrawBench(
        prompts=tuple(
            Prompt(id=f"{index:05d}", text=row["prompt"].strip(), tags=(row["category"].strip(),))
            for index, row in enumerate(checked)
        ),
        images_per_prompt=images_per_prompt,
    )
