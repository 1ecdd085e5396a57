"""Trajectories with known errors: the forward process itself, one that runs ahead by design, and a tiny model's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from semantic_routing.analysis.trajectory import effective_time, lead_interval, measure, psnr, sample_trajectory
from semantic_routing.sampling.load import load_bundle
from semantic_routing.sampling.samplers import euler, noise_for, schedule
from semantic_routing.sampling.text_to_image import SampleConfig

TIMES = schedule(20)[:-1]
NOISE, FINAL = torch.randn(3, 2, 4, 4), torch.rand(3, 2, 4, 4) * 2 - 1


def at(t: torch.Tensor) -> torch.Tensor:
    return (1 - t) * NOISE + t * FINAL


def test_the_forward_process_itself_has_no_lead() -> None:
    found = measure([at(t) for t in TIMES], FINAL, TIMES.numpy(), torch.randn(3, 2, 4, 4))
    assert np.abs(found.lead).max() < 1e-3
    assert found.error == pytest.approx(found.forward, rel=1e-4)
    assert np.abs(found.fresh / found.forward - 1).max() > 0.01


def test_eulers_method_on_a_straight_flow_is_exact() -> None:
    states: list[torch.Tensor] = []
    final = euler(lambda x, t: FINAL - NOISE, NOISE, schedule(20), callback=lambda i, t, x, v: states.append(x))
    found = measure(states, final, TIMES.numpy(), NOISE)
    assert np.abs(found.lead).max() < 1e-3


def test_a_trajectory_that_runs_ahead_leads_by_that_much() -> None:
    ahead = 1 - (1 - TIMES) ** 2  # t + t (1 - t)
    found = measure([at(t) for t in ahead], FINAL, TIMES.numpy(), NOISE)
    expected = (TIMES * (1 - TIMES)).numpy()[:, None]
    assert found.lead == pytest.approx(np.broadcast_to(expected, (20, 3)), abs=1e-3)
    mean, low, high = lead_interval(found.lead)
    assert low <= mean <= high
    assert mean == pytest.approx(expected[1:].mean(), abs=1e-3)


def test_mean_squared_error_and_signal_to_noise_of_known_numbers() -> None:
    final = torch.tensor([[[-0.5, 0.5]], [[-1.0, 3.0]]])[:, None]
    found = measure([final + 0.5, final + 0.1], final, np.array([0.0, 0.5]), final)
    assert found.error == pytest.approx(np.array([[0.25, 0.25], [0.01, 0.01]]), rel=1e-5)
    assert found.peak.tolist() == [1, 4]
    assert psnr(found.error, found.peak)[1] == pytest.approx([20, 20 + 20 * np.log10(4)], rel=1e-5)
    assert effective_time(np.array([[0.25], [0.0625], [0.0]]), np.array([0.25])).ravel().tolist() == [0, 0.5, 1]


def test_the_interval_is_that_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    by_image = rng.normal(0.03, 0.01, size=400)
    mean, low, high = lead_interval(np.stack([np.zeros(400), by_image, by_image]))
    assert mean == pytest.approx(by_image.mean())
    half = 1.96 * by_image.std() / 20
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


def test_a_models_trajectory_begins_at_its_noise_and_ignores_the_batch(tiny_run: Path) -> None:
    bundle = load_bundle(tiny_run, torch.device("cpu"))
    prompts = ["a red circle", "a star", "a blue square"]
    found = sample_trajectory(bundle, prompts, SampleConfig(steps=4, guidance=2.0, batch=2))
    again = sample_trajectory(bundle, prompts, SampleConfig(steps=4, guidance=2.0, batch=3))
    assert found.error.shape == (4, 3)
    assert found.times == pytest.approx([0, 0.25, 0.5, 0.75])
    assert np.array_equal(found.error, again.error)
    names = [(i, 0) for i in range(3)]
    final = bundle.sample_latents(prompts, names, SampleConfig(steps=4, guidance=2.0))
    noise = noise_for(0, names, final.shape[1:])
    assert found.error[0] == pytest.approx(((noise - final) ** 2).flatten(1).mean(1).numpy(), rel=1e-5)
    assert np.array_equal(found.lead[0], np.zeros(3))
