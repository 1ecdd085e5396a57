"""The time that a time-dependent router is told while sampling, where it is not the nominal one.

Only the gate's time changes; the path, the network's own time and the steps stay as they are.
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
"""Nominal times [T] to the gate's times [T], both from 0 (noise) to 1 (data)."""
NOMINAL, SHIFTED = "nominal", "shifted"
SIZE, START = 0.02, 0.2
"""The paper's largest advance, and the time from which on there is any (Eq. 11)."""


def shifted(t: Float[Tensor, " T"], size: float = SIZE, start: float = START) -> Float[Tensor, " T"]:
    """The gate's advance of Eq. 11: from ``start`` on it grows as half a cosine up to ``size`` at t = 1.

    A negative size holds the gate back. What it is told stays from 0 to 1.
    """
    delta = size / 2 * (1 - torch.cos(torch.pi * (t - start) / (1 - start)))
    return torch.where(t > start, t + delta, t).clamp(0, 1)


def tabulated(times: Float[Tensor, " S"], values: Float[Tensor, " S"]) -> Clock:
    """Linear interpolation of a measured curve from (0, 0) to (1, 1), such as the effective time of each step.

    ValueError where the curve is none: times must rise, all must lie from 0 to 1.
    """
    times, values = times.double(), values.double()
    if times.ndim != 1 or times.shape != values.shape or len(times) < 1:
        raise ValueError(f"a clock needs as many values as times, not {tuple(values.shape)} for {tuple(times.shape)}")
    inside = all(bool((x.isfinite() & (x >= 0) & (x <= 1)).all()) for x in (times, values))
    if not inside or (times.diff() <= 0).any():
        raise ValueError("a clock's times must rise, and times and values lie from 0 to 1")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    inner = (times > 0) & (times < 1)
    known = torch.cat([ends[:1], times[inner], ends[1:]])
    told = torch.cat([ends[:1], values[inner], ends[1:]])

    def clock(t: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
        x = t.double().cpu().contiguous()
        right = torch.searchsorted(known, x, right=True).clamp(1, len(known) - 1)
        share = (x - known[right - 1]) / (known[right] - known[right - 1])
        return torch.lerp(told[right - 1], told[right], share).to(t)

    return clock


def parse_clock(name: str) -> Clock | None:
    """A clock from "nominal" (None), "shifted", "shifted:SIZE", "shifted:SIZE:START", or a calibration's path.

    ValueError for anything else.
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
        known = "nominal, shifted, shifted:SIZE or the file of a calibration"
        raise ValueError(f"unknown clock {name!r}: use {known}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no calibration ({error}); make one with semroute analyze --trajectory") from error


def _parse_shift(name: str) -> Clock:
    first, _, second = name.removeprefix(f"{SHIFTED}:").partition(":")
    try:
        size, start = float(first), float(second or START)
        if not (abs(size) <= 1 and 0 <= start < 1):
            raise ValueError("out of range")
    except ValueError as error:
        raise ValueError(
            f"{name!r} is no shift: give its size from -1 to 1, perhaps its start from 0 to below 1: shifted:0.05:0.2"
        ) from error
    return partial(shifted, size=size, start=start)
