"""Prompts from the command line or a file: one a line, JSONL, or CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path

COLUMNS = ("prompt", "text", "caption")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: .jsonl and .csv by their column prompt, text or caption, anything else by line.

    Raises ValueError where the file is missing, empty, not UTF-8, or a row has no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"there is no prompts file {path}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix == ".jsonl":
        found = [_column(_json(line, path, n), path, n) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    elif path.suffix == ".csv":
        found = [_column(row, path, n) for n, row in enumerate(csv.DictReader(text.splitlines()), 2)]
    else:
        found = [line.strip() for line in text.splitlines() if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompts; write one a line")
    return found


def _json(line: str, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is not JSON: {error.msg}") from error


def _column(row: object, path: Path, number: int) -> str:
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        for column in COLUMNS:
            if isinstance(row.get(column), str):
                return row[column]
    raise ValueError(f"{path}:{number} has no text under {', '.join(COLUMNS)}")
