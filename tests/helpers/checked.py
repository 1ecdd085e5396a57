"""Checks of annotated arrays at run time: types, shapes and all other parameters of the functions that have any."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping

Checker = Callable[[Any], Any]
JAXTYPED = jaxtyping.jaxtyped


def check_arrays(package: str) -> None:
    """Check the calls of a package's functions and dataclasses that have annotated arrays; import it afterwards.

    jaxtyping's hook would check every function. Seven of eight have no array, mypy knows their types, and checking them
    took a third of the tests' time.
    """
    jaxtyping.jaxtyped = _jaxtyped  # the name that the hook puts above each function
    jaxtyping.install_import_hook(package, "beartype.beartype")


def _jaxtyped(function: Any = None, *, typechecker: Checker) -> Any:
    """Decorate a function or dataclass as jaxtyping does, if an array is annotated."""
    if function is None:
        return partial(_jaxtyped, typechecker=typechecker)
    return JAXTYPED(function, typechecker=typechecker) if _has_arrays(function) else function


def _has_arrays(function: Any) -> bool:
    """Return whether an annotation names a type of jaxtyping, or another name for one."""
    called = function.__init__ if isinstance(function, type) else function
    names = getattr(called, "__globals__", {})
    return any(
        "jaxtyping" in repr(names.get(word))
        for annotation in getattr(called, "__annotations__", {}).values()
        for word in re.findall(r"\w+", str(annotation))
    )
