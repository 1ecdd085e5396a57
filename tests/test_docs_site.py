"""The documentation's links on the forge and in the site, and its API reference; ``make docs`` builds the site."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import semantic_routing

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def tool(name: str) -> ModuleType:
    """Import a program of ``tools/``, which is no package."""
    spec = spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    """Return a page without its code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`|^ {4}.*$", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a forge gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.is_file() or (anchor and anchor not in anchors(found)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "docs/training.md", "training.md"),
        ("README.md", "docs/images/quickstart.png", "images/quickstart.png"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("docs/training.md", "../README.md#layout", "index.md#layout"),
        ("docs/training.md", "sampling.md", "sampling.md"),
        ("docs/training.md", "../LICENSE", "repository/LICENSE"),
        ("docs/results/study-toy/tables.md", "../../log.md", "../../log.md"),
        ("docs/results/study-toy/tables.md", "../../../Makefile", "../../repository/Makefile"),
        ("docs/training.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/training.md", "no-such-file.md", "no-such-file.md"),
    ],
)
def test_links_are_changed_for_the_site(source: str, link: str, expected: str) -> None:
    assert tool("docs_site").relinked(f"see [it]({link}).", source) == f"see [it]({expected})."


def test_linked_files_outside_the_docs_are_copied() -> None:
    text = "[a](../LICENSE) [b](../README.md) [c](training.md) [d](../missing.txt)"
    assert tool("docs_site").linked_files(text, "docs/page.md") == {"LICENSE"}


def navigation() -> list[tuple[str, str]]:
    """Return the title, empty if it is the page's own, and the page of all entries of the site's navigation."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"^ +- (?:(\w+): )?([\w-]+\.md)\b", text, re.MULTILINE)


def test_every_page_is_in_the_navigation() -> None:
    names = [page for _, page in navigation()]
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | set(tool("docs_site").PAGES.values())
    assert sorted(names) == sorted(pages)


def test_no_page_is_listed_under_the_name_of_the_site() -> None:
    """A page without a title in the navigation is listed under its first heading, below the name of the site."""
    (site,) = re.findall(r"^site_name: (.+)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    sources = {page: ROOT / source for source, page in tool("docs_site").PAGES.items()}
    for title, page in navigation():
        first = sources.get(page, ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n")[0]
        assert (title or first.removeprefix("# ")) != site, page


def test_the_reference_has_every_public_name_once() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    names = re.findall(r"^::: semantic_routing\.(\w+)$", text, re.MULTILINE)
    assert sorted(names) == sorted(set(semantic_routing.__all__) - {"__version__"})


def test_warnings_end_the_build() -> None:
    """With ``--quiet`` mkdocs does not see its own warnings, and a strict build passes with dead links."""
    (line,) = re.findall(r"^\t.*mkdocs build.*$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert "--strict" in line.split()
    assert "--quiet" not in line.split()
