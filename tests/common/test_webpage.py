"""The frame of HTML pages."""

from __future__ import annotations

from pathlib import Path

from semantic_routing.common.webpage import STYLE, document


def test_a_page_holds_its_styles_and_script_and_escapes_its_title(tmp_path: Path) -> None:
    (tmp_path / "own.css").write_text("b { color: red }\n")
    (tmp_path / "own.js").write_text("let x = 1 < 2;\n")
    page = document("a < b & c", "<p>text</p>\n", styles=(tmp_path / "own.css",), script=tmp_path / "own.js")
    parts = ["<title>a &lt; b &amp; c</title>", STYLE.read_text(), "b { color: red }", "<p>text</p>", "let x = 1 < 2;"]
    assert [page.count(part) for part in parts] == [1] * 5
    assert [page.index(part) for part in parts] == sorted(page.index(part) for part in parts)
    assert "src=" not in page
    assert "href=" not in page
