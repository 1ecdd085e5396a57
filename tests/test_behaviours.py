"""The page of behaviours says what the tests' marks say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.behaviours import PAGE, page, rows


def test_the_page_is_what_the_tests_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/behaviours.py"


@pytest.mark.parametrize(
    "mark", ['"Training", when="a"', '"Elsewhere", when="a", then="b"', '"Training", when="a", then=str(1)']
)
def test_a_mark_that_makes_no_row_is_refused(mark: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(f"@pytest.mark.behaviour({mark})\ndef test_it(): ...\n")
    with pytest.raises(ValueError, match=r"test_it\.py:1"):
        list(rows(tmp_path))
