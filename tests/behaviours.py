"""Generator of ``docs/what-happens-when.md``: each row is the ``behaviour`` mark of a test.

    python tests/behaviours.py     # run after changing a mark

A mark names the chapter, the situation and the program's behaviour, which its test shows::

    @pytest.mark.behaviour("Training", when="a second process trains into a run's folder", then="is refused, ...")
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "what-happens-when.md"
CHAPTERS = (
    "Text encoders",
    "Pictures and captions",
    "Training",
    "Sampling",
    "diffusers",
    "Adopting a model",
    "Judges and scores",
    "Exploring",
    "Surroundings",
)
HEAD = """# What happens when ...

What the program does with bad input, with unusual input, and on a machine with problems. Each row is tested; this page is generated from the tests' own marks by `python tests/behaviours.py`.
"""  # noqa: E501


class Row(NamedTuple):
    """One row of the page."""

    chapter: str
    when: str
    then: str


def rows(folder: Path = TESTS) -> Iterator[Row]:
    """Yield the marks of all tests by file and line; ValueError for a mark that is not three literal strings."""
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.behaviour":
                yield _row(node, f"{path}:{node.lineno}")


def _row(mark: ast.Call, place: str) -> Row:
    try:
        (chapter,) = map(ast.literal_eval, mark.args)
        said = {word.arg: ast.literal_eval(word.value) for word in mark.keywords}
        row = Row(chapter, said.pop("when"), said.pop("then"))
    except (ValueError, KeyError) as error:
        raise ValueError(f'{place}: expected behaviour("chapter", when="...", then="...")') from error
    if said or chapter not in CHAPTERS:
        raise ValueError(f"{place}: chapter {chapter!r} is not one of {', '.join(CHAPTERS)}")
    return row


def page() -> str:
    """Return the text of the page."""
    found = sorted(set(rows()))
    text = HEAD
    for chapter in CHAPTERS:
        if table := [row for row in found if row.chapter == chapter]:
            text += f"\n## {chapter}\n\n| when | then |\n| --- | --- |\n"
            text += "".join(f"| {_cell(row.when)} | {_cell(row.then)} |\n" for row in table)
    return text


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
