"""Conversion of configurations (frozen dataclasses) to JSON and back, with every key and type checked."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """Return the end of an error message about an unknown name: the closest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dictionaries of JSON types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: object, where: str = "") -> T:
    """Return a configuration from nested dictionaries; missing keys keep their defaults.

    Raises ValueError for an unknown key (naming the nearest known one), for a missing key without a default, and for a
    value of another type. ``where`` is put before keys in messages, such as "model.".
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or cls.__name__} must be an object of settings, not {values!r}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ValueError(f"unknown setting {where + key!r}; {nearest(key, list(fields))}")
    for key, field in fields.items():
        if key not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"setting {where + key!r} is missing and has no default")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in values.items()})


def read_config(cls: type[T], path: Path) -> T:
    """Read a configuration from a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"there is no configuration file {path}") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    check_finite(values)
    return from_dict(cls, values)


def check_finite(settings: Any, where: str = "") -> None:
    """Raise ValueError if a setting is infinite or NaN, which passes most checks of ranges."""
    if dataclasses.is_dataclass(settings):
        settings = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    if isinstance(settings, dict):
        for name, value in settings.items():
            check_finite(value, f"{where}.{name}" if where else name)
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_finite(value, where)
    elif isinstance(settings, float) and not math.isfinite(settings):
        raise ValueError(f"{where} is {settings}; it must be a finite number")


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type ``kind``; JSON lacks tuples and may write 2.0 as 2."""
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, f"{where}.")  # type: ignore[arg-type]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _convert(option, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise ValueError(f"{where} is {value!r}; {nearest(str(value), [str(a) for a in args])}")
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ValueError(f"{where} is {value!r}; it must have {len(kinds)} entries")
        return tuple(_convert(item_kind, item, where) for item_kind, item in zip(kinds, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    elif kind is type(None) and value is None:
        return None
    elif kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r}, which is not {getattr(kind, '__name__', kind)}")
