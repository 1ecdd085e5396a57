"""Schedulers of diffusers that can integrate this program's flow, and the times of their steps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler
from jaxtyping import Float
from torch import Tensor

from semantic_routing.interop.numerals import whole
from semantic_routing.sampling.samplers import schedule

FLOW_MATCHING = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
"""Schedulers that always integrate a flow; others do so with ``use_flow_sigmas``."""
Numbers = Sequence[Any] | np.ndarray | Tensor


def check_scheduler(scheduler: Any) -> None:
    """Raise ValueError unless the scheduler integrates a flow from sigma 1 to 0."""
    name, config = type(scheduler).__name__, scheduler.config
    prediction, flow_sigmas = config.get("prediction_type", "flow_prediction"), config.get("use_flow_sigmas", False)
    if not (isinstance(scheduler, FLOW_MATCHING) or flow_sigmas) or prediction != "flow_prediction":
        raise ValueError(
            f"this transformer predicts a flow's velocity, but {name} with prediction_type={prediction!r} and "
            f"use_flow_sigmas={flow_sigmas} is not flow matching: use FlowMatchEulerDiscreteScheduler, or a scheduler "
            "made with use_flow_sigmas=True and prediction_type='flow_prediction'"
        )
    for option in ("use_dynamic_shifting", "invert_sigmas"):
        if config.get(option):
            raise ValueError(f"{name} has {option}=True, which this transformer was not trained for; make it False")


def asked_sigmas(steps: Any, sigmas: Numbers | None, timesteps: Numbers | None) -> Float[Tensor, " T"] | int:
    """Return the sigmas that a call gives, as such or as timesteps (1000 sigma), or else its number of steps."""
    if sigmas is None and timesteps is None:
        return whole("num_inference_steps", steps)
    if sigmas is not None and timesteps is not None:
        raise ValueError("give either sigmas or timesteps, not both")
    name, given, unit = ("sigmas", sigmas, 1) if timesteps is None else ("timesteps", timesteps, 1000)
    try:
        numbers = [float(number) / unit for number in given]  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {given!r}; expected a list of numbers") from error
    falling = all(a > b for a, b in zip(numbers, [*numbers[1:], 0.0], strict=True))
    if not numbers or not falling or not math.isfinite(numbers[0]) or numbers[0] > 1:
        raise ValueError(f"{name} must decrease from at most {unit} and stay above 0, but {given!r} do not")
    return torch.tensor(numbers, dtype=torch.float64)


def set_times(scheduler: Any, asked: Float[Tensor, " T"] | int, device: torch.device) -> Float[Tensor, " T"]:
    """Set the scheduler's sigmas or number of steps; return the time t of each of its timesteps.

    A scheduler that takes sigmas gets this program's schedule, which it may shift. Times are computed as 1 - sigma,
    because some schedulers round their timesteps to integers.
    """
    check_scheduler(scheduler)
    name = type(scheduler).__name__
    if "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        sigmas = 1 - schedule(asked)[:-1] if isinstance(asked, int) else asked.float()
        scheduler.set_timesteps(sigmas=sigmas.numpy(), device=device)
    elif isinstance(asked, int):
        scheduler.set_timesteps(asked, device=device)
    else:
        raise ValueError(f"{name} makes its own sigmas: leave out sigmas and timesteps, or use another scheduler")
    scheduler.set_begin_index(0)
    sigmas = scheduler.sigmas.float().cpu()
    if len(sigmas) != len(scheduler.timesteps) + 1 or sigmas[0] > 1 or (sigmas.diff() > 0).any():
        raise ValueError(
            f"{name} has sigmas from {sigmas[0]:g} to {sigmas[-1]:g}, but flow matching needs them to decrease from at "
            "most 1: leave out its options for other sigmas"
        )
    return 1 - sigmas[:-1]


def time_of(scheduler: Any, step: int, device: torch.device) -> Float[Tensor, " 1"]:
    """Return the time t at which a step of the scheduler begins."""
    return (1 - scheduler.sigmas[step].float())[None].to(device)
