"""Imports of optional packages, with a one-line error that names the extra to install."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, *, what: str, extra: str = "") -> Any:
    """Import and return a module that ``what`` needs; ValueError names the extra, or the package, to install."""
    package = module.partition(".")[0]
    try:
        import_module(package)  # fails for a broken package whose modules are partly loaded
        return import_module(module)
    # A package that does not fit another's version may raise anything: AttributeError with another NumPy,
    # RuntimeError from its own checks, TypeError from its decorators.
    except Exception as error:
        wanted = f"semantic-routing[{extra}]" if extra else package
        raise ValueError(
            f'{what} needs {package}, which cannot be imported: {type(error).__name__}: {error}; pip install "{wanted}"'
        ) from error


def require_diffusers(what: str) -> None:
    """Import diffusers and what it needs to load and save pipelines."""
    require("accelerate", what=what, extra="diffusers")
    require("diffusers.pipelines.pipeline_utils", what=what, extra="diffusers")
