"""The velocity of a model for given prompts, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.flow import guided_velocity
from semantic_routing.model.context import TextContext, concat_padded, join_contexts
from semantic_routing.model.dit import Backbone
from semantic_routing.model.runtime import CUDAGraphRunner
from semantic_routing.sampling.clock import Clock
from semantic_routing.sampling.samplers import Velocity
from semantic_routing.sampling.text_plan import TextPlan
from semantic_routing.text.features import TextFeatures

Contexts = Callable[[Tensor, Tensor], TextContext]
"""(x [B, ...], t [1]) -> the text that the network's blocks read at this point."""


def text_velocity(
    model: Backbone, features: TextFeatures, clock: Clock | None = None, times: Float[Tensor, " T"] | None = None
) -> Velocity:
    """Return the model's velocity for these prompts.

    ``clock`` maps the nominal time to the gate time. ``times``, if known, are all times of the sampler's steps, in
    order (see ``TextPlan``).
    """
    return reading(model, TextPlan(model, features, clock=clock, times=times).at)


def reading(model: Backbone, text: Contexts) -> Velocity:
    """Return the model's velocity, with each step's context from ``text``; replay a CUDA graph if possible."""
    network = CUDAGraphRunner(model) if model.use_cuda_graph else model
    return lambda x, t: network(x, t, text(x, t)).float()


def guided(
    model: Backbone,
    features: TextFeatures,
    null: TextFeatures,
    scale: float,
    clock: Clock | None = None,
    times: Float[Tensor, " T"] | None = None,
) -> Velocity:
    """Return the velocity with classifier-free guidance (Ho & Salimans, 2022): ``null + scale * (prompt - null)``.

    ``features`` and ``null`` are encoded prompts and null prompts; ``null`` holds one null prompt for all prompts, or
    one for each. Both run as one batch. At scale 1 only the prompts are computed. ``clock`` maps the nominal time to
    the time at which time-dependent routing is evaluated. ``times``, if known, are all times of the sampler's steps,
    which lets the text of several steps be prepared together.
    """
    if scale == 1:
        return text_velocity(model, features, clock, times)
    if model.reads_latents:  # then the null prompt's text differs between images, too
        return extrapolated(text_velocity(model, join(features, null)), scale)
    prompt, nothing = (TextPlan(model, half, clock=clock, times=times) for half in (features, null))
    kept: list[tuple[TextContext, TextContext]] = []

    def both(x: Tensor, t: Tensor) -> TextContext:
        half = prompt.at(x, t)
        if not kept or kept[0][0] is not half:
            kept[:] = [(half, join_contexts(half, nothing.at(x, t)))]
        return kept[0][1]

    return extrapolated(reading(model, both), scale)


def extrapolated(both: Velocity, scale: float) -> Velocity:
    """Return the guided velocity; ``both`` takes the samples twice, for their prompts and for the null prompts."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        prompt, nothing = both(torch.cat([x, x]), t).chunk(2)
        return guided_velocity(prompt, nothing, scale)

    return velocity


def join(features: TextFeatures, null: TextFeatures) -> TextFeatures:
    """Concatenate prompts and their null prompts into one batch, padded to the longer of the two."""
    batch, length = features.mask.shape
    longest = max(length, null.mask.shape[1])
    pairs = [(features.hidden, null.hidden, 2), (features.keys, null.keys, 2), (features.values, null.values, 2)]
    hidden, keys, values = (
        None if a is None or b is None else concat_padded(a, b, batch, longest, rows=1, tokens=a.ndim - token)
        for a, b, token in pairs
    )
    assert hidden is not None
    return TextFeatures(hidden, concat_padded(features.mask, null.mask, batch, longest, rows=0, tokens=1), keys, values)
