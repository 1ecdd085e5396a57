"""The one-way streets of the package: each file imports only from those above it in ``ORDER``."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "semantic_routing"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

ORDER = [
    # what everything may know: configurations, errors and the machine
    "config",
    "errors",
    "extras",
    "troubles",
    "stopping",
    "claims",
    "arguments",
    "device",
    "manifest",
    "processes",
    "connection",
    # the network
    "arms",
    "features",
    "flow",
    "ragged",
    "varlen",
    "layers",
    "kernels",
    "kernels.native",
    "kernels.gpu",
    "kernels.mix",
    "fusion",
    "noise_level",
    "dit",
    "fusedit",
    "flops",
    "optim",
    # text in, images out
    "storage",
    "text_loading",
    "text_chat",
    "text_encoder",
    "tiny_lm",
    "codec",
    "clock",
    "recording",
    "text_plan",
    "sampler",
    # what there is to learn
    "data",
    "data.claims",
    "data.scenes",
    "data.shapes",
    "data.stories",
    "data.order",
    "data.png",
    "data.colours",
    "data.formats",
    "data.images",
    "data.records",
    "data.found",
    "data.files",
    "data.dimensions",
    "data.tar_members",
    "data.tars",
    "data.row_groups",
    "data.parquet",
    "data.manifest_rows",
    "data.splits",
    "data.folder",
    "data.discover",
    "data.index",
    "data.statistics",
    "data.captions",
    "data.sidecar",
    "data.damage",
    "data.buckets",
    "data.streams",
    "data.sources",
    "data.rows",
    "data.loader",
    "origins",
    # runs
    "checkpoint",
    "pictures",
    "webpage",
    "answers",
    "replies",
    "spoken",
    "servers",
    "chat",
    "data.caption_parts",
    "data.recaption",
    "data.indexing",
    "data.preview",
    "data.commands",
    "prompts",
    "generate",
    "parallel",
    "tracking",
    "watchdog",
    "meter",
    "validation",
    "train_config",
    "run_folder",
    "ahead",
    "trainer",
    "train",
    "recipes",
    # what came of them
    "upstream_files",
    "evaluate",
    "evaluate.shapes",
    "evaluate.scores",
    "evaluate.listing",
    "evaluate.benchmark",
    "evaluate.page",
    "evaluate.scoring",
    "evaluate.run",
    "evaluate.shapes_benchmark",
    "evaluate.genai_bench",
    "evaluate.drawbench",
    "evaluate.resampling",
    "evaluate.compare",
    "evaluate.features",
    "evaluate.geneval",
    "evaluate.geneval_detector",
    "evaluate.geneval_colors",
    "evaluate.mmdet_weights",
    "evaluate.geneval_models",
    "evaluate.judge",
    "evaluate.local_judge",
    "analyze",
    "analyze.figures",
    "analyze.statistics",
    "analyze.weights",
    "analyze.trajectory",
    "analyze.routing",
    "analyze.trajectory_figures",
    "analyze.distances",
    "analyze.page",
    "report",
    "quickstart",
    "overhead",
    "convert",
    "convert_commands",
    "numerals",
    "facts",
    "flow_schedulers",
    "conditioning",
    "transformer",
    "lora",
    "components",
    "pipeline",
    "export",
    "evaluate.geneval_benchmark",
    "evaluate.models",
    "evaluate.commands",
    "analyze.commands",
    "study",
    "study.plan",
    "study.runner",
    "study.results",
    "study.tables",
    "cli",
    "__main__",
    "explorer",
]
"""Every file of the package, foundations first; a name may stand here before its file exists."""


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


def test_every_file_has_its_place() -> None:
    assert len(ORDER) == len(set(ORDER))
    assert set(FILES) - {""} <= set(ORDER), "put new files where they belong in ORDER"


@pytest.mark.parametrize("name", FILES)
def test_imports_point_upwards(name: str) -> None:
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    above = ORDER[: ORDER.index(name)] if name else []
    assert imported(tree) <= set(above)


def test_imported_sees_every_form_of_import() -> None:
    source = f"""
import {PACKAGE}.flow
from {PACKAGE} import __version__, dit
from {PACKAGE}.layers import linear
def late():
    from {PACKAGE}.data import shapes
"""
    assert imported(ast.parse(source)) == {"flow", "dit", "layers", "data.shapes"}


EXTRAS = {
    "accelerate",
    "diffusers",
    "fsspec",
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


@pytest.mark.parametrize("name", ["train", "quickstart", "generate", "analyze.commands", "evaluate.commands"])
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


@pytest.mark.parametrize("name", [PACKAGE, f"{PACKAGE}.cli"])
def test_import_is_light(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
