"""Schedulers of diffusers: the same steps as this program's, other solvers, schedulers that are refused."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from semantic_routing.interop.flow_schedulers import set_times
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.sampling.samplers import noise_for, schedule
from tests.helpers.pipelines import draw, exact


@pytest.mark.parametrize("steps", [1, 7, 20, 50])
def test_euler_takes_exactly_the_steps_of_this_program(pipe: SemanticRoutingPipeline, steps: int) -> None:
    times = set_times(pipe.scheduler, steps, torch.device("cpu"))
    assert torch.equal(times, schedule(steps)[:-1])
    assert torch.equal(-pipe.scheduler.sigmas.diff(), schedule(steps).diff())
    assert torch.equal(pipe.scheduler.timesteps, 1000 * pipe.scheduler.sigmas[:-1])


def test_the_shift_of_a_scheduler_is_that_of_this_program() -> None:
    times = set_times(FlowMatchEulerDiscreteScheduler(shift=3.0), 20, torch.device("cpu"))
    torch.testing.assert_close(times, schedule(20, 3.0)[:-1])


def other_schedulers() -> dict[str, Any]:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return {
        "heun": diffusers.FlowMatchHeunDiscreteScheduler(),
        "dpm": diffusers.DPMSolverMultistepScheduler(**flow),
        "dpm-single": diffusers.DPMSolverSinglestepScheduler(**flow, lower_order_final=True),
        "unipc": diffusers.UniPCMultistepScheduler(**flow),
        "deis": diffusers.DEISMultistepScheduler(**flow),
    }


@pytest.mark.filterwarnings("ignore:__array")  # diffusers reads tensors with an old numpy call
def test_other_flow_schedulers_converge_to_the_same_images(pipe: SemanticRoutingPipeline) -> None:
    """So sign, time and order of the velocity are right for solvers with an internal state."""
    fine = draw(exact(pipe), num_inference_steps=400)
    start = noise_for(0, [(0, 0), (1, 0)], pipe.latent_shape())
    for name, scheduler in other_schedulers().items():
        pipe.scheduler = scheduler
        error = (draw(pipe, num_inference_steps=100) - fine).square().mean().sqrt()
        assert error < 0.02 * (fine - start).square().mean().sqrt(), name


def test_a_scheduler_is_replaced_through_its_configuration(pipe: SemanticRoutingPipeline) -> None:
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    assert draw(pipe).isfinite().all()
    pipe.scheduler = diffusers.FlowMatchLCMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(i) for i in (4, 4)]
    assert torch.equal(draw(pipe, generator=generators[0]), draw(pipe, generator=generators[1]))


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDIMScheduler(), "DDIMScheduler with prediction_type='epsilon' .* is not flow matching"),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler .* not flow matching"),
        (diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), "prediction_type='epsilon'"),
        (diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"), "use_flow_sigmas=False"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
    ],
)
def test_schedulers_that_are_not_flow_matching_are_refused(
    pipe: SemanticRoutingPipeline, scheduler: Any, message: str
) -> None:
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        draw(pipe)


def test_sigmas_that_are_not_flow_matching_are_refused(pipe: SemanticRoutingPipeline) -> None:
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    scheduler.sigma_max = 80.0
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match="has sigmas from 80 to 0, but flow matching needs them"):
        draw(pipe)


def test_sigmas_and_timesteps_set_the_schedule(pipe: SemanticRoutingPipeline) -> None:
    expected = draw(pipe)
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2]
    torch.testing.assert_close(draw(pipe, sigmas=sigmas), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(draw(pipe, timesteps=[1000 * s for s in sigmas]), expected, atol=1e-3, rtol=1e-3)
    assert not torch.equal(draw(pipe, sigmas=np.array([1.0, 0.1])), expected)
    for options, message in (
        ({"sigmas": [0.5, 0.8]}, "sigmas must decrease from at most 1"),
        ({"sigmas": [0.8, 0.8]}, "sigmas must decrease from at most 1"),
        ({"timesteps": [2000, 3]}, "timesteps must decrease from at most 1000"),
        ({"sigmas": [1.0], "timesteps": [1000]}, "give either sigmas or timesteps"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(pipe, **options)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="makes its own sigmas"):
        draw(pipe, sigmas=sigmas)
