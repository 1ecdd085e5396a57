"""Command-line arguments from dataclasses, through tyro, with unknown options named as one clear error."""

from __future__ import annotations

import dataclasses
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

import tyro

T = TypeVar("T")


def parse(cls: type[T], args: list[str], *, prog: str, default: T | None = None) -> T:
    """An instance of the dataclass ``cls`` from options; each field is one, nested fields have dots.

    Raises ValueError for an unknown option, naming the nearest known one. tyro itself ends the process with
    code 2 and a message for a value of the wrong kind, and with 0 after --help.
    """
    known = [*_options(cls), "--help"]
    for arg in args:
        name = arg.split("=", 1)[0].replace("_", "-")
        if arg.startswith("--") and name not in known:
            close = get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"{prog} --help lists the options"
            raise ValueError(f"unknown option {name}; {hint}")
    if default is None:
        return tyro.cli(cls, args=args, prog=prog)
    return tyro.cli(cls, args=args, prog=prog, default=default)


def _options(cls: Any, prefix: str = "") -> list[str]:
    """Every option of a configuration, as tyro spells it."""
    names = []
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(kind):
            names += _options(kind, f"{name}.")
        else:
            names.append(f"--{name}")
            if kind is bool:
                names.append(f"--{prefix}no-{name.removeprefix(prefix)}")
    return names
