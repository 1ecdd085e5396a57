"""The sampling trajectory against the training forward process (Section 5.2).

Both are measured by their mean squared error to the final latents x̂1. The forward process built from x̂1,
x_t = (1 - t) noise + t x̂1, has the error (1 - t)² mse(noise, x̂1). The **effective time** of a sampling step is the
time at which the forward process has the error of the trajectory; it has a closed form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage

LEAD = "lead.json"
"""File of the leads of a run's trajectories, the last that their analysis measures."""
FRESH = 1
"""Added to the run seed for the forward process from fresh noise."""


@dataclass(frozen=True)
class Trajectory:
    """Errors to the final latents of B images at the beginning of each of S steps."""

    times: Float[np.ndarray, " S"]
    """Nominal times; the first is 0."""
    error: Float[np.ndarray, "S B"]
    """Mean squared error of the sampling trajectory."""
    forward: Float[np.ndarray, "S B"]
    """Mean squared error of the forward process from the same noise."""
    fresh: Float[np.ndarray, "S B"]
    """Mean squared error of the forward process from fresh noise."""
    peak: Float[np.ndarray, " B"]
    """Range of the values of each final latent, for the signal-to-noise ratio."""

    @property
    def effective(self) -> Float[np.ndarray, "S B"]:
        """Time at which the forward process from the same noise has the error of the trajectory."""
        return effective_time(self.error, self.error[0])

    @property
    def lead(self) -> Float[np.ndarray, "S B"]:
        """Effective time minus nominal time."""
        return self.effective - self.times[:, None]


def effective_time(error: Float[np.ndarray, "S B"], start: Float[np.ndarray, " B"]) -> Float[np.ndarray, "S B"]:
    """Solve (1 - t)² start = error for t; ``start`` is the error of pure noise."""
    return 1 - np.sqrt(error / start)


def psnr(error: Float[np.ndarray, "S B"], peak: Float[np.ndarray, " B"]) -> Float[np.ndarray, "S B"]:
    """Return the peak signal-to-noise ratio in decibels: 10 log10(peak² / mse)."""
    return 10 * np.log10(peak**2 / error)


def squared_error(a: Float[Tensor, " B *shape"], b: Float[Tensor, " B *shape"]) -> Float[np.ndarray, " B"]:
    """Return the mean squared error of each sample, computed in float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1).numpy(force=True)


def measure(
    states: Sequence[Float[Tensor, " B *shape"]],
    final: Float[Tensor, " B *shape"],
    times: Float[np.ndarray, " S"],
    other_noise: Float[Tensor, " B *shape"],
) -> Trajectory:
    """Return the errors of a trajectory; ``states`` are the latents at the beginning of each step, noise first."""
    remaining = (1 - np.asarray(times, dtype=np.float64))[:, None] ** 2
    end = final.flatten(1).double()
    return Trajectory(
        times=np.asarray(times, dtype=np.float64),
        error=np.stack([squared_error(x, final) for x in states]),
        forward=remaining * squared_error(states[0], final),
        fresh=remaining * squared_error(other_noise.to(final.device), final),
        peak=(end.amax(1) - end.amin(1)).numpy(force=True),
    )


def sample_trajectory(bundle: TextToImage, prompts: Sequence[str], cfg: SampleConfig) -> Trajectory:
    """Sample one image for each prompt, ``cfg.batch`` at a time, and measure the trajectories."""
    parts = []
    for first in range(0, len(prompts), cfg.batch):
        names = [(index, 0) for index in range(first, min(first + cfg.batch, len(prompts)))]
        parts.append(_batch_trajectory(bundle, [prompts[index] for index, _ in names], names, cfg))
    by_image = ("error", "forward", "fresh", "peak")
    joined = {name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in by_image}
    return Trajectory(times=parts[0].times, **joined)


def _batch_trajectory(
    bundle: TextToImage, prompts: Sequence[str], names: Sequence[tuple[int, int]], cfg: SampleConfig
) -> Trajectory:
    states: list[Tensor] = []
    times: list[float] = []

    def keep(step: int, t: Tensor, x: Tensor, v: Tensor) -> None:
        states.append(x.float().cpu())
        times.append(float(t))

    final = bundle.sample_latents(prompts, names, cfg, keep).float().cpu()
    fresh = noise_for(cfg.seed + FRESH, names, final.shape[1:])
    return measure(states, final, np.array(times), fresh)


def lead_interval(
    lead: Float[np.ndarray, "S B"], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Return the mean lead without the first step (0), and its bootstrap interval (low, high) over images."""
    by_image = lead[1:].mean(0)
    rng = np.random.default_rng(seed)
    means = by_image[rng.integers(len(by_image), size=(draws, len(by_image)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(by_image.mean()), float(low), float(high)
