"""Numbers as people have them: from numpy, from a tensor, from a slider that only knows floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

Number = int | float | np.number | np.ndarray | Tensor
"""A number of any type: Python's, numpy's, or the one of a tensor without axes."""


def whole(name: str, value: Any, *, at_least: int = 1) -> int:
    """The int that ``value`` is, whatever its type; ValueError, with ``name``, for all that is no whole number."""
    number = _scalar(value)
    if number is None or not math.isfinite(number) or number != int(number):
        raise ValueError(f"{name} is {value!r}; expected a whole number")
    if number < at_least:
        raise ValueError(f"{name} is {value!r}; it must be at least {at_least}")
    return int(number)


def finite(name: str, value: Any, *, at_most: float) -> float:
    """The float that ``value`` is, whatever its type; ValueError, with ``name``, unless -at_most <= it <= at_most."""
    number = _scalar(value)
    if number is None or not abs(number) <= at_most:
        raise ValueError(f"{name} is {value!r}; expected a number between {-at_most:g} and {at_most:g}")
    return float(number)


def _scalar(value: Any) -> int | float | None:
    """The number that ``value`` is, or None: a truth value and a text are none, nor are several numbers."""
    if isinstance(value, np.ndarray | np.generic | Tensor) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
