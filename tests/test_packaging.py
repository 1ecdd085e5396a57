"""What a release needs: one version, typed, quick to import. ``make release`` builds and installs it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import semantic_routing
from tests.test_docs_site import ROOT, tool

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def project(folder: Path, *, package: str = "1.2.0", cited: str = "1.2.0", heading: str = "1.2.0 (2026-12-01)") -> Path:
    """Write the files of a project that name its version."""
    source = folder / "src/semantic_routing"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text(f'"""It."""\n\n__version__ = "{package}"\n')
    (folder / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited}\n")
    (folder / "CHANGELOG.md").write_text(f"# Changelog\n\n## {heading}\n\n## 1.1.0 (2026-11-01)\n")
    return folder


def test_the_version_is_in_one_place() -> None:
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    release = tool("release")
    assert release.version() == semantic_routing.__version__
    release.check_versions(rehearse=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cited": "1.1.0"}, "CITATION.cff has version 1.1.0, the package 1.2.0"),
        ({"heading": "1.1.0 (2026-11-01)"}, "CHANGELOG.md begins with version 1.1.0, the package is 1.2.0"),
        ({"heading": "1.2.0 (unreleased)"}, r"CHANGELOG.md says \(unreleased\) of version 1.2.0: write the date"),
    ],
)
def test_a_release_with_a_wrong_version_is_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    release = tool("release")
    release.check_versions(project(tmp_path / "right"))
    with pytest.raises(release.NotReady, match=message):
        release.check_versions(project(tmp_path / "wrong", **changes))


def test_a_release_may_be_rehearsed_before_its_date_is_known(tmp_path: Path) -> None:
    tool("release").check_versions(project(tmp_path, heading="1.2.0 (unreleased)"), rehearse=True)


def test_files_besides_modules_are_there() -> None:
    release = tool("release")
    assert [name for name in release.IN_WHEEL if not (ROOT / "src/semantic_routing" / name).is_file()] == []
    assert [name for name in release.IN_SDIST if not (ROOT / name).is_file()] == []


def test_the_package_says_that_it_is_typed() -> None:
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "src/semantic_routing/py.typed").read_text() == ""


@pytest.mark.parametrize("extra", ["docs", "release"])
def test_tools_have_pinned_requirements(extra: str) -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.partition("==")[0].lower() for line in pins}
    for requirement in PROJECT["optional-dependencies"][extra]:
        name = requirement.partition(">")[0].partition("[")[0]
        assert name in pinned, f"constraints.txt has no pin of {name}"
