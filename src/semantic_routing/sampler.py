"""Samplers: pure functions that integrate a velocity from noise (t = 0) to an image (t = 1), and guidance.

A sampler knows nothing of networks or text: it sees one callable ``velocity(x, t)``. Guidance wraps that
callable; ``text_velocity`` makes it from a model and prompts, preparing the text once per prompt wherever
routing does not depend on time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from semantic_routing.clock import Clock
from semantic_routing.dit import Backbone
from semantic_routing.features import TextFeatures

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], t [1], the one time of all samples) -> velocity [B, ...]."""
Callback = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called after every step with (step, time, x, velocity) as they were at the step's beginning."""


def schedule(steps: int, shift: float = 1.0) -> Float[Tensor, " steps_plus_1"]:
    """Times from 0 to 1 in float32; ``shift`` > 1 spends more of them near the noise (Esser et al., 2024).

    In terms of the noise level sigma = 1 - t the shift is ``shift * sigma / (1 + (shift - 1) * sigma)``. Times
    are rounded to multiples of 2^-24: then t, 1 - t and their steps are exact, and samplers that count in sigma
    take the very same steps.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, not {steps}")
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    times = 1 - shift * sigma / (1 + (shift - 1) * sigma)
    return ((times * 2**24).round() / 2**24).float()


def euler(
    velocity: Velocity, x: Float[Tensor, "B *shape"], times: Tensor, callback: Callback | None = None
) -> Float[Tensor, "B *shape"]:
    """Euler's method: one velocity a step, first order."""
    for i, (t, step) in enumerate(zip(times[:-1], times.diff(), strict=True)):
        v = velocity(x, t[None].to(x.device))
        if callback is not None:
            callback(i, t, x, v)
        x = x + step.to(x.device) * v
    return x


def heun(
    velocity: Velocity, x: Float[Tensor, "B *shape"], times: Tensor, callback: Callback | None = None
) -> Float[Tensor, "B *shape"]:
    """Heun's method: the mean of the velocities at both ends of a step, second order; the last step is Euler's.

    At t = 1 there is no noise left to estimate, so the last step has no second velocity.
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


def ancestral(
    velocity: Velocity,
    x: Float[Tensor, "B *shape"],
    times: Tensor,
    callback: Callback | None = None,
    *,
    fresh: Callable[[int], Tensor],
) -> Float[Tensor, "B *shape"]:
    """Predict the image, then noise it anew to the next time with ``fresh(step)`` [B, ...].

    Every step forgets the noise before it, as in ancestral sampling (DDPM; Song et al., 2021, with eta = 1), so what
    one step got wrong about the scene the next can still mend.
    """
    for i, (t, following) in enumerate(pairwise(times)):
        v = velocity(x, t[None].to(x.device))
        if callback is not None:
            callback(i, t, x, v)
        image = x + (1 - t).to(x.device) * v
        following = following.to(x.device)
        x = image if i + 2 == len(times) else (1 - following) * fresh(i) + following * image
    return x


SAMPLERS = {"euler": euler, "heun": heun}


def text_velocity(model: Backbone, features: TextFeatures, clock: Clock | None = None) -> Velocity:
    """The model's velocity for these prompts; the text is prepared once unless routing depends on time.

    ``clock`` turns the nominal time into the one that routing is told.
    """
    once = None if model.depends_on_time else model.prepare_text(features)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if once is not None:
            return model(x, t, once).float()
        told = model.gate_time(x, t if clock is None else clock(t))
        return model(x, t, model.prepare_text(features, told)).float()

    return velocity


def guided(
    model: Backbone, features: TextFeatures, null: TextFeatures, scale: float, clock: Clock | None = None
) -> Velocity:
    """Classifier-free guidance (Ho & Salimans, 2022): null + scale * (prompt - null), both in one batch.

    ``null`` holds the features of the null prompt, for each prompt or once for all. At scale 1 the null half
    is not computed.
    """
    if scale == 1:
        return text_velocity(model, features, clock)
    return extrapolated(text_velocity(model, join(features, null), clock), scale)


def extrapolated(both: Velocity, scale: float) -> Velocity:
    """Guidance of a velocity that takes one batch: first the samples with their prompts, then with the null ones."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        prompt, nothing = both(torch.cat([x, x]), t).chunk(2)
        return nothing + scale * (prompt - nothing)

    return velocity


def join(features: TextFeatures, null: TextFeatures) -> TextFeatures:
    """Prompts and their null prompts as one batch, padded to the longer of the two."""
    batch, length = features.mask.shape
    longest = max(length, null.mask.shape[1])

    def both(a: Tensor | None, b: Tensor | None, axis: int) -> Tensor | None:
        """Pad the token axis (``axis`` from the end), repeat the null prompt for every prompt, concatenate."""
        if a is None or b is None:
            return None
        pad = [0] * (2 * axis - 2)
        a, b = (F.pad(x, [*pad, 0, longest - x.shape[-axis]]) for x in (a, b))
        return torch.cat([a, b.expand(-1, batch, *b.shape[2:])], dim=1)

    hidden = both(features.hidden, null.hidden, 2)
    mask = both(features.mask[None], null.mask[None], 1)
    assert hidden is not None
    assert mask is not None
    return TextFeatures(hidden, mask[0], both(features.keys, null.keys, 2), both(features.values, null.values, 2))


def noise_for(
    seed: int, images: Sequence[tuple[int, int]], shape: tuple[int, ...], step: int | None = None
) -> Float[Tensor, "B *shape"]:
    """Noise of images named by (prompt index, image index), each a function of these and ``seed`` alone.

    So an image is the same in any batch, order or number of processes. Without a ``step`` it is the starting
    noise; with one, what ``ancestral`` adds after that step.
    """
    return torch.stack([_noise(seed, prompt, image, step, shape) for prompt, image in images])


def _noise(seed: int, prompt: int, image: int, step: int | None, shape: tuple[int, ...]) -> Tensor:
    name = f"{seed}/{prompt}/{image}" if step is None else f"{seed}/{prompt}/{image}/{step}"
    digest = blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)
