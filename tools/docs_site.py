"""Hooks of mkdocs (mkdocs.yml): pages from the repository's root, and links that work on the forge and in the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Pages of the site that are not in docs/: file in the repository, page in the site."""
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
"""A Markdown link without a scheme: its file and its anchor."""


def site_path(path: str) -> str | None:
    """Return where a file of the repository is in the site; None if there is no such file."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if (ROOT / path).is_file() else None


def linked_files(text: str, source: str) -> set[str]:
    """Return the repository's files outside docs/ that a page links to and that are no pages."""
    paths = {posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2])) for found in LINK.finditer(text)}
    return {path for path in paths if (site_path(path) or "").startswith("repository/")}


def relinked(text: str, source: str) -> str:
    """Return a page's text with its links changed from the repository's folders to the site's."""
    here = posixpath.dirname(site_path(source) or "")

    def link(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        target = site_path(path)
        return found[0] if target is None else f"{found[1]}{posixpath.relpath(target, here)}{found[3] or ''}{found[4]}"

    return LINK.sub(link, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from the repository's root and the files that pages link to."""
    from mkdocs.structure.files import File

    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES}
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=sources[name]))
    for path in sorted((ROOT / "docs").rglob("*.md")):
        sources[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    for path in sorted(set().union(*(linked_files(text, source) for source, text in sources.items()))):
        files.append(File.generated(config, f"repository/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Change the links of a page before it is rendered."""
    sources = {target: source for source, target in PAGES.items()}
    return relinked(markdown, sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
