"""Clocks: functions from the nominal time of a sampling step to the time at which the routing gates are evaluated.

Only the gates' time changes. The path, the network's own time and the steps stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

Clock = Callable[[Tensor], Tensor]
"""(nominal times [T]) -> gate times [T], both from 0 (noise) to 1 (data)."""
NOMINAL, SHIFTED = "nominal", "shifted"
SIZE, START = 0.02, 0.2
"""Eq. 11 of the paper: the largest advance, reached at t = 1, and the time at which the advance begins."""


def shifted(t: Float[Tensor, " T"], size: float = SIZE, start: float = START) -> Float[Tensor, " T"]:
    """Advance the gate time as in Eq. 11: by half a cosine that begins at ``start`` and reaches ``size`` at t = 1.

    A negative size delays the gates. Gate times are clamped to [0, 1].
    """
    delta = size / 2 * (1 - torch.cos(torch.pi * (t - start) / (1 - start)))
    return torch.where(t > start, t + delta, t).clamp(0, 1)


def tabulated(times: Float[Tensor, " S"], values: Float[Tensor, " S"]) -> Clock:
    """Interpolate a measured curve linearly, from (0, 0) to (1, 1), such as the effective time of each step.

    Raises ValueError unless ``times`` increase and all numbers are from 0 to 1.
    """
    times, values = times.double(), values.double()
    if times.ndim != 1 or times.shape != values.shape or len(times) < 1:
        raise ValueError(f"a clock needs as many values as times, not {tuple(values.shape)} for {tuple(times.shape)}")
    inside = all(bool((x.isfinite() & (x >= 0) & (x <= 1)).all()) for x in (times, values))
    if not inside or (times.diff() <= 0).any():
        raise ValueError("a clock's times must increase, and its times and values must be from 0 to 1")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    inner = (times > 0) & (times < 1)
    nominal = torch.cat([ends[:1], times[inner], ends[1:]])
    gate = torch.cat([ends[:1], values[inner], ends[1:]])

    def clock(t: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        x = t.double().cpu().contiguous()
        right = torch.searchsorted(nominal, x, right=True).clamp(1, len(nominal) - 1)
        share = (x - nominal[right - 1]) / (nominal[right] - nominal[right - 1])
        return torch.lerp(gate[right - 1], gate[right], share).to(t)

    return clock


def parse_clock(name: str) -> Clock | None:
    """Parse "nominal" (None), "shifted", "shifted:SIZE", "shifted:SIZE:START" or the path of a calibration file.

    Raises ValueError for anything else.
    """
    if name in (NOMINAL, SHIFTED):
        return shifted if name == SHIFTED else None
    if name.startswith(f"{SHIFTED}:"):
        return _parse_shift(name)
    path = Path(name)
    try:
        curve = json.loads(path.read_text(encoding="utf-8"))
        return tabulated(torch.tensor(curve["times"]), torch.tensor(curve["effective"]))
    except FileNotFoundError as error:
        known = "nominal, shifted, shifted:SIZE or a calibration file"
        raise ValueError(f"unknown clock {name!r}: use {known}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is not a calibration ({error}); make one with semroute analyze --trajectory"
        ) from error


def _parse_shift(name: str) -> Clock:
    first, _, second = name.removeprefix(f"{SHIFTED}:").partition(":")
    try:
        size, start = float(first), float(second or START)
        if not (abs(size) <= 1 and 0 <= start < 1):
            raise ValueError("out of range")
    except ValueError as error:
        raise ValueError(
            f"{name!r} is not a shift: give a size from -1 to 1 and optionally a start from 0 to below 1, such as "
            "shifted:0.05:0.2"
        ) from error
    return partial(shifted, size=size, start=start)
