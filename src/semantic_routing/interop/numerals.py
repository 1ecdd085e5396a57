"""Conversion of numbers of any type to int and float, from numpy, tensors or sliders that only give floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

Number = int | float | np.number | np.ndarray | Tensor
"""A number of Python or numpy, or an array or tensor without axes."""


def whole(name: str, value: Any, *, at_least: int = 1) -> int:
    """Convert a number to int; raise ValueError that names ``name`` unless it is whole and ``at_least``."""
    number = _scalar(value)
    if number is None or not math.isfinite(number) or number != int(number):
        raise ValueError(f"{name} is {value!r}; expected a whole number")
    if number < at_least:
        raise ValueError(f"{name} is {value!r}; it must be at least {at_least}")
    return int(number)


def finite(name: str, value: Any, *, at_most: int) -> float:
    """Convert a number to float; raise ValueError that names ``name`` unless -at_most <= value <= at_most."""
    number = _scalar(value)
    if number is None or not abs(number) <= at_most:
        raise ValueError(f"{name} is {value!r}; expected a number between {-at_most:g} and {at_most:g}")
    return float(number)


def _scalar(value: Any) -> int | float | None:
    """Return the number, or None if ``value`` is not one number; bools and strings are not numbers."""
    if isinstance(value, np.ndarray | np.generic | Tensor) and value.ndim == 0:
        value = value.item()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
