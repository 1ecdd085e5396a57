"""Samplers: pure functions that integrate a velocity from noise (t = 0) to an image (t = 1).

A sampler knows nothing of networks or text: it sees one callable ``velocity(x, t)``, which ``guidance.py`` makes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t [1], the one time of all samples) -> velocity [B, ...]."""
Callback = Callable[[int, Tensor, Tensor, Tensor], None]
"""(step, time, x, velocity), all as at the beginning of the step; called at every step."""
Noise = Callable[[int], Tensor]
"""(step) -> the fresh noise [B, ...] that a stochastic sampler adds after that step."""
Sampler = Callable[..., Tensor]
"""(velocity, x [B, ...], times, *, noise, callback) -> samples [B, ...]."""
SamplerName = Literal["euler", "heun", "euler-ancestral", "renoise"]
SamplerSpelling = Literal["euler", "heun", "euler-ancestral", "renoise", "ancestral"]
RENOISE_ONCE = "ancestral"
"""The name of ``renoise`` in version 0.1; settings may still use it."""


def schedule(steps: int, shift: float = 1.0) -> Float[Tensor, " steps_plus_1"]:
    """Return ``steps`` + 1 times from 0 (noise) to 1 (data) in float32.

    ``shift`` > 1 puts more of them near the noise (Esser et al., 2024): the noise level sigma = 1 - t becomes ``shift *
    sigma / (1 + (shift - 1) * sigma)``. Times are rounded to multiples of 2^-24. Then t, 1 - t and their differences
    are exact, and samplers that work with sigma take the same steps.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, not {steps}")
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = 1 - shift * sigma / (1 + (shift - 1) * sigma)
    return ((times * 2**24).round() / 2**24).float()


def euler(
    velocity: Velocity,
    x: Float[Tensor, " B *shape"],
    times: Float[Tensor, " steps_plus_1"],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, " B *shape"]:
    """Integrate with Euler's method: first order, one evaluation of ``velocity`` per step.

    ``x`` is the noise at ``times[0]``, and ``times`` those of ``schedule``. ``callback(step, t, x, velocity)`` is
    called at every step. ``noise`` is not used. All samplers have this signature:

        model_velocity = guided(model, encoder.encode(prompts), encoder.encode([""]), scale=3.0)
        latents = euler(model_velocity, noise_for(0, [(0, 0)], shape), schedule(50))
    """
    for i, (t, step) in enumerate(zip(times[:-1], times.diff(), strict=True)):
        v = velocity(x, t[None].to(x.device))
        if callback is not None:
            callback(i, t, x, v)
        x = x + step.to(x.device) * v
    return x


def heun(
    velocity: Velocity,
    x: Float[Tensor, " B *shape"],
    times: Float[Tensor, " steps_plus_1"],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, " B *shape"]:
    """Integrate with Heun's method: second order, with the mean of the velocities at both ends of a step.

    The last step is an Euler step, because no noise is left to estimate at t = 1. ``noise`` is not used.
    """
    for i, (t, step) in enumerate(zip(times[:-1], times.diff(), strict=True)):
        v = velocity(x, t[None].to(x.device))
        if callback is not None:
            callback(i, t, x, v)
        end = x + step.to(x.device) * v
        if i + 2 < len(times):
            v = (v + velocity(end, times[i + 1, None].to(x.device))) / 2
            end = x + step.to(x.device) * v
        x = end
    return x


def euler_ancestral(
    velocity: Velocity,
    x: Float[Tensor, " B *shape"],
    times: Float[Tensor, " steps_plus_1"],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, " B *shape"]:
    """Sample the reverse Markov chain (DDPM, Ho et al., 2020; DDIM with eta = 1, Song et al., 2021).

    A step from t to s keeps a part of the estimated noise and replaces the rest:
    ``x_s = s * image + sqrt((1 - s)^2 - up^2) * estimate + up * fresh`` with
    ``up^2 = (1 - s)^2 * (1 - (t / s)^2 * (1 - s)^2 / (1 - t)^2)``, the variance that the forward process adds between
    s and t. With more steps it converges to the data distribution.
    """
    noise = noise or (lambda step: torch.randn_like(x))
    for i, (t, s) in enumerate(pairwise(times.to(x.device))):
        v = velocity(x, t[None])
        if callback is not None:
            callback(i, times[i], x, v)
        image, estimate = x + (1 - t) * v, x - t * v  # v = image - estimate
        x = image
        if i + 2 < len(times):
            kept = (t / s * (1 - s) / (1 - t)) ** 2  # of the noise's variance
            x = s * image + (1 - s) * (kept.sqrt() * estimate + (1 - kept).sqrt() * noise(i))
    return x


def renoise(
    velocity: Velocity,
    x: Float[Tensor, " B *shape"],
    times: Float[Tensor, " steps_plus_1"],
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, " B *shape"]:
    """Predict the image, then add new noise for the next time (consistency sampling, Song et al., 2023, Algorithm 1).

    All noise is replaced at every step, so a later step can correct errors of an earlier one. The samples do not
    converge to the data distribution but favour its modes: a Gaussian of standard deviation 0.40 is sampled with 0.28.
    """
    noise = noise or (lambda step: torch.randn_like(x))
    for i, (t, s) in enumerate(pairwise(times.to(x.device))):
        v = velocity(x, t[None])
        if callback is not None:
            callback(i, times[i], x, v)
        image = x + (1 - t) * v
        x = image if i + 2 == len(times) else (1 - s) * noise(i) + s * image
    return x


SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "euler-ancestral": euler_ancestral, "renoise": renoise}


def sampler_name(spelling: SamplerSpelling) -> SamplerName:
    """Return a sampler's current name; the old name of renoise is accepted with a warning."""
    if spelling != "ancestral":
        return spelling
    warnings.warn(
        'the sampler "ancestral" is now called renoise, and renoise is used; the true ancestral sampler is '
        "euler-ancestral",
        FutureWarning,
        stacklevel=4,
    )
    return "renoise"


def noise_for(
    seed: int, images: Sequence[tuple[int, int]], shape: tuple[int, ...], step: int | None = None
) -> Float[Tensor, " B *shape"]:
    """Return standard normal noise for images, given as (prompt index, image index): [B, *shape].

    The noise of an image depends only on its two indices, ``seed`` and ``step``. An image is therefore the same in any
    batch, in any order and on any number of processes. Without ``step`` it is the starting noise; with ``step`` it is
    the noise that a stochastic sampler adds after that step.
    """
    return torch.stack([_noise(seed, prompt, image, step, shape) for prompt, image in images])


def _noise(seed: int, prompt: int, image: int, step: int | None, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator_for(seed, prompt, image, step))


def generator_for(seed: int, prompt: int, image: int, step: int | None = None) -> torch.Generator:
    """Return a random generator whose state depends only on an image's indices, ``seed`` and ``step``."""
    name = f"{seed}/{prompt}/{image}" if step is None else f"{seed}/{prompt}/{image}/{step}"
    digest = blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
