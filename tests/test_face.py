"""The face of the package: what can be imported from it by name, and that it costs nothing until then."""

from __future__ import annotations

import ast
import inspect
import pydoc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import semantic_routing


@pytest.mark.parametrize("name", semantic_routing.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(semantic_routing, name) is not None


def test_the_names_are_pinned() -> None:
    """They are what others build on: take one away, or rename it, only with a new version."""
    names = [name for name in semantic_routing.__all__ if not name.startswith("__")]
    assert " ".join(names) == (
        "ARMS Arm Codec DataConfig DiT DiTConfig FuseDiT PixelCodec Router Routing RoutingOverride SampleConfig "
        "SemanticRoutingPipeline SemanticRoutingTransformer TextContext TextEncoder TextEncoderConfig TextFeatures "
        "TextToImage TrainConfig VAECodec adopt euler euler_ancestral evaluate_images evaluate_model from_upstream "
        "guided heun load load_routing make_model make_router mix noise_for open_data overridden recipes renoise "
        "resume schedule to_upstream train"
    )
    assert set(semantic_routing.__all__) <= set(dir(semantic_routing))


def test_names_do_not_turn_into_packages() -> None:
    """A package of the same name would take a name's place as soon as anything imports it."""
    packages = {path.parent.name for path in Path(semantic_routing.__file__).parent.glob("*/__init__.py")}
    assert packages & set(semantic_routing.__all__) == {"adopt"}
    assert callable(import_module("semantic_routing.adopt"))


def test_help_on_adopt_is_the_functions() -> None:
    """The package that takes the function's place has its documentation and its arguments, and can be called."""
    package = import_module("semantic_routing.adopt")
    function = import_module("semantic_routing.adopt.api").adopt
    assert semantic_routing.adopt is package
    assert inspect.signature(package) == inspect.signature(function)
    shown = pydoc.plain(pydoc.render_doc(package))
    assert "Put routing onto a loaded diffusers pipeline" in shown.partition("PACKAGE CONTENTS")[0]
    with pytest.raises(ValueError, match=r"adopt needs a pipeline, or both text_encoder and transformer"):
        package()
    with pytest.raises(ValueError, match=r"give adopt a pipeline, or text_encoder and transformer, but not both"):
        package(object(), transformer=torch.nn.Identity())


def test_editors_see_the_same_names() -> None:
    """The imports for type checkers name all that is imported when it is asked for."""
    tree = ast.parse(Path(semantic_routing.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname or alias.name for node in imports for alias in node.names}
    assert seen == set(semantic_routing.__all__) - {"__version__"}


def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import sys, semantic_routing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Bundle'"):
        semantic_routing.Bundle  # noqa: B018
