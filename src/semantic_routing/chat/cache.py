"""Content-addressed answers: no question is paid for twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from semantic_routing.chat.messages import ENTRY, Answer
from semantic_routing.common.config import from_dict, to_dict
from semantic_routing.common.files import PARTIAL, write_text

log = logging.getLogger(__name__)


class AnswerCache:
    """Answers in a folder, ``ab/abcdef....json``, each written whole; many processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Return the path of the answer with that digest."""
        return self.folder / name[:2] / f"{name}.json"

    def get(self, name: str) -> Answer | None:
        """Return the cached answer; None if it is missing or damaged."""
        path = self.path(name)
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            return from_dict(Answer, {**entry["answer"], "cached": True})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s is damaged (%s): left aside", path, error)
            return None

    def put(self, name: str, facts: Mapping[str, Any], answer: Answer) -> None:
        """Cache an answer and the question's facts. Raises ValueError if the folder cannot be written."""
        write_text(self.path(name), json.dumps({"question": facts, "answer": to_dict(answer)}, ensure_ascii=False))

    def remove(self, name: str) -> None:
        """Delete an answer."""
        self.path(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete all answers, those that a killed process left half-written too, and no other file of the folder."""
        for path in self.folder.glob("??/*"):
            if ENTRY.fullmatch(path.name.removeprefix(".").partition(PARTIAL)[0]):
                path.unlink(missing_ok=True)
        for folder in (*self.folder.glob("??"), self.folder):
            with suppress(OSError):  # not empty
                folder.rmdir()
