"""Prompts from a file: one per line, JSONL, or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from semantic_routing.common.files import read_text

COLUMNS = ("prompt", "text", "caption")


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file: .jsonl and .csv from the column prompt, text or caption; other files line by line.

    Raises ValueError if the file is missing, empty or not UTF-8, or if a row has no prompt.
    """
    text = read_text(path, "prompts file")
    # Not splitlines: it also splits at characters that a prompt may hold.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".jsonl":
        found = [_column(_json(line, path, number), path, number) for number, line in lines]
    elif path.suffix.lower() == ".csv":
        found = [_column(row, path, number) for number, row in _csv(text, path)]
    else:
        found = [line for _, line in lines]
    if not found:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return found


def _json(line: str, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is not JSON: {error.msg}") from error


def _csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:  # DictReader's key for cells beyond the columns: half of a prompt would be lost
                raise ValueError(f"{path}:{reader.line_num} has more cells than columns: put quotes around commas")
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num} is not CSV: {error}") from error


def _column(row: object, path: Path, number: int) -> str:
    texts = [row.get(column) for column in COLUMNS] if isinstance(row, dict) else [row]
    for prompt in texts:
        if isinstance(prompt, str) and prompt.strip():
            return prompt
    found = f"; it has {', '.join(row)}" if isinstance(row, dict) else ""
    raise ValueError(f"{path}:{number} has no text under {', '.join(COLUMNS)}{found}")
