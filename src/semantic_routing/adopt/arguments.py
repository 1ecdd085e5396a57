"""Arguments of a call by name, as forward hooks get them: some by position, some by keyword."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


def by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all given arguments by name."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def replaced(name: str, place: int, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return the arguments with another value for the one called ``name``, whose position is ``place``."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:place], value, *args[place + 1 :]), kwargs
