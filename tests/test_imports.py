"""The one-way streets of the package: its parts import downwards, files of one part not in circles."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = "semantic_routing"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

LAYERS = (
    "common", "flow", "text", "model", "toy", "checkpoint", "chat", "data", "sampling", "training", "evaluation",
    "interop", "adopt", "analysis", "study", "explorer", "cli",
)  # fmt: skip
"""The package's parts, from the ground up: each imports only from those before it. Some are still to come."""


def module_name(file: Path) -> str:
    """The dotted name inside the package; the package's own ``__init__`` is the empty name."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(file): file for file in sorted(SOURCE.rglob("*.py"))}


def imported(tree: ast.AST) -> set[str]:
    """Names inside the package that a file imports anywhere, late imports included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the import as 'from {PACKAGE}...'"
            # `from a.b import c` may mean the file a/b/c.py or the name c of a/b.py.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix(PACKAGE + ".") in FILES else node.module for name in names}
    return {name.removeprefix(PACKAGE + ".") for name in found if name.startswith(PACKAGE + ".")}


UNPLACED = {"", "__main__", "pipeline", "transformer"}
"""The face, the command, and two names that old exported pipelines ask for: they stand above all."""


def layer(name: str) -> int:
    """How high a file stands; ValueError for a file or folder that is none of the layers."""
    return LAYERS.index(name.partition(".")[0])


@pytest.mark.parametrize("name", sorted(FILES.keys() - UNPLACED))
def test_imports_go_down(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    upwards = {other for other in imported(tree) if layer(other) > layer(name)}
    assert not upwards, f"{name} stands below {', '.join(upwards)}"


def test_no_imports_go_in_circles() -> None:
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items() if name}
    graphlib.TopologicalSorter({name: imported(tree) for name, tree in trees.items()}).prepare()  # CycleError


def test_imported_sees_every_form_of_import() -> None:
    source = f"""
import {PACKAGE}.flow
from {PACKAGE} import __version__, flow
from {PACKAGE}.model import dit
from {PACKAGE}.model.layers import linear
def late():
    from {PACKAGE}.toy import captions
"""
    assert imported(ast.parse(source)) == {"flow", "model.dit", "model.layers", "toy.captions"}


EXTRAS = {
    "accelerate",
    "diffusers",
    "fsspec",
    "gradio",
    "grain",
    "openai",
    "peft",
    "pillow_heif",
    "pyarrow",
    "tensorboard",
    "torchmetrics",
}


def at_once(tree: ast.Module) -> ast.Module:
    """What runs when a file is imported: without its functions, and what is for type checkers alone."""
    kept = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
    return ast.Module(kept, [])


@pytest.mark.parametrize("name", ["training.loop", "cli.quickstart", "sampling.load", "cli.analyze", "cli.evaluate"])
def test_a_plain_install_has_all_that_is_imported(name: str) -> None:
    """Of a command's file and all that it imports, none imports what only an extra brings."""
    waiting, seen = [name], set[str]()
    while waiting:
        if (place := waiting.pop()) in seen:
            continue
        seen.add(place)
        tree = at_once(ast.parse(FILES[place].read_text(encoding="utf-8")))
        roots = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        roots |= {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert not {root.partition(".")[0] for root in roots} & EXTRAS, place
        waiting += imported(tree) & set(FILES)
    assert len(seen) > 10
