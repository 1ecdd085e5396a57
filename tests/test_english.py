"""The language rule of CONTRIBUTING.md, as far as a program can check it."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
NO_VERBS = ("What", "Where", "How", "Who", "Whether")
"""First words of noun clauses, where a function's docstring should have a verb in the imperative."""
HOUSE_WORDS = re.compile(
    r"\b(anew|mend(s|ed|ing)?|so many|(so )?manieth"
    r"|to the( last)? bit|without end|can(not)? be had|weighs? something)\b",
    re.IGNORECASE,
)
"""Words that a reader would not expect: again, fix, a number, bitwise, endlessly, is available, has a weight."""


def complaints(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and reason for everything in a file that breaks the rule."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node):
            words = (ast.get_docstring(node) or "").split()
            if words and words[0].strip(":,") in NO_VERBS:
                yield node.lineno, f"{node.name}: the docstring begins with {words[0]!r} instead of a verb"
    for line, text in [*strings(tree), *comments(source)]:
        for found in HOUSE_WORDS.finditer(" ".join(text.split())):
            yield line, f"house word {found[0]!r}"


def is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
    return bool(names & {"property", "cached_property"})


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of docstrings, help texts, error messages and all other strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of comments; comments on consecutive lines are one text."""
    first, last, text = 0, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if text and line == last + 1:
                text += token.string.lstrip("#")
            else:
                if text:
                    yield first, text
                first, text = line, token.string.lstrip("#")
            last = line
    if text:
        yield first, text


def test_docstrings_begin_with_a_verb_and_nothing_has_house_words() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {reason}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line, reason in complaints(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join([f"{len(found)} places break the language rule of CONTRIBUTING.md:", *found])


BROKEN = '''
class Model:
    """What is fine for a class."""

    depth: int
    """Where a field may do so, too."""

    @property
    def width(self):
        """How wide it is: properties are noun phrases."""

    def gate(self):
        """What the gate gives."""

        def _inner():
            """Whether it is open."""


async def ask():
    """Where: the answer."""
    raise ValueError(f"try {ask} "
                     "so "
                     "many times; mend it")  # and begin
    # anew


def amend():
    """Recommend whatever is manifold; there is so much."""
'''


def test_the_rule_is_applied_to_functions_strings_and_comments() -> None:
    reasons = sorted(reason.partition(":")[0] for _, reason in complaints(BROKEN))
    assert reasons == ["_inner", "ask", "gate", "house word 'anew'", "house word 'mend'", "house word 'so many'"]
