"""The frame and style of all HTML pages; a page needs no network and no other file."""

from __future__ import annotations

from html import escape
from pathlib import Path

STYLE = Path(__file__).with_suffix(".css")


def document(title: str, body: str, *, styles: tuple[Path, ...] = (), script: Path | None = None) -> str:
    """Return a complete HTML page with the shared style, then ``styles``; ``script`` runs after ``body``."""
    style = "".join(path.read_text(encoding="utf-8") for path in (STYLE, *styles))
    code = "" if script is None else f"<script>\n{script.read_text(encoding='utf-8')}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}</main>\n{code}</body>\n</html>\n"
    )
