"""The estimator's energies of noise are known, and it learns the time of noisy pictures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from semantic_routing.flow import path
from semantic_routing.model.noise_level import SCALES, NoiseLevel, energies
from semantic_routing.toy.captions import sample


def test_energies_of_white_noise_are_known() -> None:
    found = energies(3 * torch.randn(4, 8, 128, 128, dtype=torch.float64)).mean(0)
    # A difference of two means of s x s pixels has the variance 2 · 9 / s².
    expected = [9.0] + [2 * 9 / s**2 for s in SCALES for _ in range(2)]
    assert found.tolist() == pytest.approx(expected, rel=0.05)


def test_a_constant_latent_is_finite() -> None:
    assert NoiseLevel()(torch.zeros(2, 3, 8, 8)).isfinite().all()


def test_an_estimate_ignores_its_batch_and_autocast() -> None:
    x, level = torch.randn(9, 3, 32, 32), NoiseLevel()
    together = level(x)
    assert together.dtype == torch.float32
    assert torch.equal(torch.cat([level(x[i : i + 1]) for i in range(9)]), together)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(level(x), together)


def test_it_learns_the_time_of_the_toy_worlds_pictures() -> None:
    torch.manual_seed(0)
    images = torch.stack([torch.from_numpy(sample(0, i, split="train", size=32).image.copy()) for i in range(64)])
    clean = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    level = NoiseLevel()
    optimizer = torch.optim.Adam(level.parameters(), lr=0.01)
    for _ in range(150):
        t = torch.rand(64)
        loss = nn.functional.mse_loss(level(path(clean, torch.randn_like(clean), t)), t)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t = torch.rand(64)
    error = (level(path(clean, torch.randn_like(clean), t)) - t).abs()
    assert error.mean() < 0.05  # guessing 1/2 errs by 0.25
