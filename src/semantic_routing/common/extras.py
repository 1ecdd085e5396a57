"""Packages that only an extra of this one brings: imported when they are asked for, or missed in one line."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def require(module: str, *, what: str, extra: str = "") -> Any:
    """Import a module that ``what`` needs; ValueError where that fails, with the extra, or the package, to install."""
    package = module.partition(".")[0]
    try:
        import_module(package)  # one that is broken may have left parts of it loaded
        return import_module(module)
    # A package that does not fit its neighbours raises whatever it comes upon: AttributeError of another NumPy,
    # RuntimeError of its own checks, TypeError of its decorators.
    except Exception as error:
        wanted = f"semantic-routing[{extra}]" if extra else package
        raise ValueError(
            f'{what} needs {package}, which cannot be imported: {type(error).__name__}: {error}; pip install "{wanted}"'
        ) from error


def require_diffusers(what: str) -> None:
    """Import diffusers with what loading and saving its pipelines needs."""
    require("accelerate", what=what, extra="diffusers")
    require("diffusers.pipelines.pipeline_utils", what=what, extra="diffusers")
