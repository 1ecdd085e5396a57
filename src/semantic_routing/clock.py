"""The time that a time-dependent router is told while sampling, where it is not the nominal one.

Only the gate's time changes; the path, the network's own time and the steps stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

Clock = Callable[[Tensor], Tensor]
"""Nominal times [T] to the gate's times [T], both from 0 (noise) to 1 (data)."""
NOMINAL, SHIFTED = "nominal", "shifted"


def shifted(t: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """The paper's advance of the gate (Eq. 11): up to 0.02 later, growing from t = 0.2 on; never past 1."""
    delta = 0.01 * (1 - torch.cos(torch.pi * (t - 0.2) / 0.8))
    return torch.where(t > 0.2, t + delta, t).clamp(max=1)


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
    """A clock from "nominal" (None), "shifted", or the path of a calibration; ValueError for anything else."""
    if name in (NOMINAL, SHIFTED):
        return shifted if name == SHIFTED else None
    path = Path(name)
    try:
        curve = json.loads(path.read_text(encoding="utf-8"))
        return tabulated(torch.tensor(curve["times"]), torch.tensor(curve["effective"]))
    except FileNotFoundError as error:
        raise ValueError(f"unknown clock {name!r}: use nominal, shifted, or the file of a calibration") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is no calibration ({error}); make one with semroute analyze --calibrate") from error
