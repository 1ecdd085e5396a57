"""The path, its velocity and the distribution of training times, against their closed forms."""

from __future__ import annotations

from statistics import NormalDist

import pytest
import torch
from jaxtyping import TypeCheckError

from semantic_routing.flow import (
    MIN_REMAINING,
    logit_normal,
    path,
    velocity,
    velocity_from_image,
    velocity_loss,
)

SHAPE = (4, 3, 5, 2)
"""The last axis is no multiple of the batch, so that time cannot be broadcast along the wrong one."""


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    image, noise = torch.randn(2, *SHAPE)
    return image, noise


def test_path_begins_with_noise_and_ends_with_data() -> None:
    image, noise = pair()
    assert torch.equal(path(image, noise, torch.zeros(4)), noise)
    assert torch.equal(path(image, noise, torch.ones(4)), image)


def test_path_is_the_straight_line_of_each_sample() -> None:
    image, noise = pair()
    t = torch.tensor([0.0, 0.2, 0.5, 0.9])
    noisy = path(image, noise, t)
    for b, s in enumerate(t.tolist()):
        torch.testing.assert_close(noisy[b], (1 - s) * noise[b] + s * image[b])


def test_velocity_is_the_derivative_of_the_path() -> None:
    image, noise = pair()
    t = torch.rand(4)
    _, derivative = torch.autograd.functional.jvp(lambda s: path(image, noise, s), t, torch.ones(4))
    torch.testing.assert_close(velocity(image, noise), derivative)


def test_true_image_gives_the_exact_velocity_until_shortly_before_the_end() -> None:
    image, noise = pair()
    for t in (0.0, 0.3, 0.8, 0.949):
        times = torch.full((4,), t)
        found = velocity_from_image(image, path(image, noise, times), times)
        # x - x_t cancels: its rounding error is divided by 1 - t.
        torch.testing.assert_close(found, velocity(image, noise), rtol=1e-4, atol=1e-6 / (1 - t))


def test_near_the_data_errors_are_amplified_no_further() -> None:
    image = torch.randn(SHAPE)
    for t in (0.96, 1.0):
        found = velocity_from_image(image + 1, image, torch.full((4,), t))
        torch.testing.assert_close(found, torch.full(SHAPE, 1 / MIN_REMAINING))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5), (-1.0, 2.0)])
def test_logit_normal_has_the_quantiles_of_its_definition(mean: float, std: float) -> None:
    quantiles = torch.tensor([0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
    t = logit_normal(quantiles, mean, std)
    assert t.dtype == torch.float32
    assert ((t > 0) & (t < 1)).all()
    # P(T <= t) = Phi((logit t - mean) / std)
    cdf = [NormalDist(mean, std).cdf(logit) for logit in torch.logit(t.double()).tolist()]
    torch.testing.assert_close(torch.tensor(cdf), quantiles, rtol=1e-4, atol=0)


def test_logit_normal_of_any_uniform_number_lies_inside() -> None:
    t = logit_normal(torch.tensor([0.0, 1.0]))
    assert ((t > 0) & (t < 1)).all()


def test_loss_is_the_mean_square_in_float32() -> None:
    predicted, target = (x.bfloat16() for x in pair())
    expected = sum((a - b) ** 2 for a, b in zip(predicted.double().flatten(), target.double().flatten(), strict=True))
    loss = velocity_loss(predicted, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected / predicted.numel(), rtol=1e-6, atol=0)


def test_annotated_shapes_are_checked_while_tests_run() -> None:
    """What every other test relies on: a shape that an annotation forbids does not pass unseen."""
    with pytest.raises(TypeCheckError, match="noise"):
        velocity(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(TypeCheckError, match="image"):
        velocity(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))
