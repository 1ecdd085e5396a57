"""The path, its velocity and the distribution of training times, against their closed forms."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from jaxtyping import TypeCheckError

from semantic_routing.flow import (
    MIN_REMAINING,
    MODE_SCALES,
    TimeConfig,
    cosmap,
    logit_normal,
    mode,
    path,
    shifted,
    time_weights,
    training_times,
    velocity,
    velocity_from_image,
    velocity_loss,
)
from semantic_routing.sampling.samplers import schedule

SHAPE = (4, 3, 5, 2)
"""The last axis is not the batch's size, so that time cannot be broadcast along it."""


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


def test_logit_normal_times_are_inside_0_and_1() -> None:
    t = logit_normal(torch.tensor([0.0, 1.0]))
    assert ((t > 0) & (t < 1)).all()


# --- training times: in Esser et al. (2024) z_t = (1 - t) x + t noise, so their times are 1 - t here ---

UNIFORM = torch.linspace(0, 1, 10_001)


@pytest.mark.parametrize("scale", [-1.0, -0.5, 0.0, 0.81, 1.29, MODE_SCALES[1]])
def test_mode_sampling_is_equation_20(scale: float) -> None:
    u = UNIFORM.double()
    theirs = 1 - u - scale * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
    torch.testing.assert_close(1 - mode(UNIFORM, scale).double(), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scale", MODE_SCALES)
def test_mode_sampling_is_monotonic_up_to_its_limits_and_no_further(scale: float) -> None:
    assert (mode(UNIFORM, scale).diff() >= 0).all()
    assert (mode(UNIFORM, 1.1 * scale).diff() < 0).any()


def test_mode_sampling_prefers_the_middle_or_the_ends() -> None:
    """The density at t(u) is 1 / t'(u), and t'(u) = 1 + s (1 - pi/2 sin(pi u)): known at the ends and the middle."""
    for scale in (-0.5, 1.29):
        slopes = mode(UNIFORM, scale).double().diff() / (UNIFORM[1] - UNIFORM[0])
        assert slopes[0].item() == pytest.approx(1 + scale, rel=1e-2)
        assert slopes[5000].item() == pytest.approx(1 + scale * (1 - math.pi / 2), rel=1e-2)


def test_cosmap_has_the_cosine_schedules_ratios() -> None:
    """Before Eq. 21: the log-SNR 2 log((1 - t) / t) of time t there is the cosine schedule's 2 log(cot(pi u / 2))."""
    u = torch.tensor([0.05, 0.3, 0.5, 0.77, 0.99])
    ours = cosmap(u).double()
    theirs = 1 - 1 / ((math.pi / 2 * (1 - u.double())).tan() + 1)  # Eq. 21, whose u runs the other way
    torch.testing.assert_close(1 - ours, theirs, rtol=0, atol=1e-7)
    torch.testing.assert_close(ours / (1 - ours), (math.pi / 2 * u.double()).tan(), rtol=1e-5, atol=0)


def test_cosmap_has_the_density_of_equation_22() -> None:
    times = cosmap(UNIFORM).double()
    between = (times[1:] + times[:-1]) / 2
    density = (1 / 10_000) / times.diff()
    torch.testing.assert_close(
        density, 2 / (math.pi - 2 * math.pi * between + 2 * math.pi * between**2), rtol=2e-3, atol=0
    )


@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode", "cosmap"])
def test_times_rise_with_the_uniform_number_and_are_symmetric(density: str) -> None:
    times = training_times(UNIFORM, TimeConfig(density=density), 256**2)
    assert times.dtype == torch.float32
    assert ((times >= 0) & (times <= 1)).all()
    assert (times.diff() >= 0).all()
    torch.testing.assert_close(times, 1 - times.flip(0), rtol=0, atol=1e-6)


def test_the_default_times_are_logit_normal_to_the_last_bit() -> None:
    u = torch.rand(1000)
    assert torch.equal(training_times(u, TimeConfig(mean=-1.7, std=1.15), 32**2), logit_normal(u, -1.7, 1.15))


def test_shift_is_equation_23_of_the_noise_level() -> None:
    t = torch.rand(1000)
    sigma = 1 - t.double()
    ratio = 3.0
    torch.testing.assert_close(
        1 - shifted(t, ratio).double(), ratio * sigma / (1 + (ratio - 1) * sigma), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(shifted(shifted(t, 3.0), 1 / 3.0), t, rtol=1e-6, atol=0)
    torch.testing.assert_close(shifted(torch.linspace(0, 1, 26), 4.0), schedule(25, 4.0), rtol=0, atol=1e-6)


def test_shift_follows_the_pixels() -> None:
    """Eq. 23: sqrt(m / n), which makes the uncertainty of a flat picture's colour the same at both sizes."""
    cfg = TimeConfig(density="uniform", shift_size=256)
    assert cfg.shift_for(256 * 256) == 1
    assert cfg.shift_for(1024 * 1024) == 4
    assert cfg.shift_for(512 * 128) == 1
    assert TimeConfig(shift=3.0, shift_size=256).shift_for(512 * 512) == 6
    assert TimeConfig(shift=3.0).shift_for(512 * 512) == 3
    t = torch.tensor([0.3])
    # The standard error of a mean of n pixels is (1 - t) / t / sqrt(n).
    high = training_times(t, cfg, 1024 * 1024)
    torch.testing.assert_close((1 - high) / high / 1024, (1 - t) / t / 256)


def test_cosmap_weights_make_uniform_times_count_as_cosmap_times_do() -> None:
    t = UNIFORM.double()
    weights = time_weights(UNIFORM, TimeConfig(weighting="cosmap")).double()
    for power in (1, 2, 5):
        weighted = torch.trapezoid(weights * t**power, t).item()
        assert weighted == pytest.approx(torch.trapezoid(cosmap(UNIFORM).double() ** power, t).item(), abs=1e-6)


def test_min_snr_weights_the_error_of_the_image() -> None:
    """Hang et al. (2023): min(SNR, 5) times the squared error of the image that follows from the velocity."""
    image, noise, wrong = torch.randn(3, *SHAPE, dtype=torch.float64).float()
    t = torch.tensor([0.1, 0.5, 0.69, 0.8])
    noisy = path(image, noise, t)
    guessed = noisy + (1 - t).reshape(-1, 1, 1, 1) * wrong
    error = (guessed - image).square().mean((1, 2, 3))
    expected = torch.minimum((t / (1 - t)) ** 2, torch.tensor(5.0)) * error
    weights = time_weights(t, TimeConfig(weighting="min_snr"))
    torch.testing.assert_close(velocity_loss(wrong, velocity(image, noise), weights), expected.mean())


def test_sigma_weights_are_capped_and_uniform_ones_are_one() -> None:
    t = torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0])
    cap = MIN_REMAINING**-2
    sigma = time_weights(t, TimeConfig(weighting="sigma"))
    torch.testing.assert_close(sigma, torch.tensor([1.0, 4.0, 100.0, cap, cap]), rtol=1e-5, atol=0)
    assert torch.equal(time_weights(t, TimeConfig()), torch.ones(5))


def test_weights_of_one_leave_the_loss_as_it_is() -> None:
    predicted, target = pair()
    assert torch.equal(velocity_loss(predicted, target, torch.ones(4)), velocity_loss(predicted, target))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"std": -1.0}, "std is -1.0 and mean 0.0; use finite numbers"),
        ({"mean": math.nan}, "mean nan; use finite numbers"),
        ({"mode_scale": 1.8}, "mode_scale is 1.8; use a number from -1 to 1.752"),
        ({"shift": 0.0}, "shift is 0.0 and snr_limit 5.0; use finite numbers above 0"),
        ({"shift_size": -1}, "shift_size is -1; use 0"),
    ],
)
def test_impossible_times_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimeConfig(**wrong)


def test_loss_is_the_mean_square_in_float32() -> None:
    predicted, target = (x.bfloat16() for x in pair())
    expected = sum((a - b) ** 2 for a, b in zip(predicted.double().flatten(), target.double().flatten(), strict=True))
    loss = velocity_loss(predicted, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected / predicted.numel(), rtol=1e-6, atol=0)


def test_annotated_shapes_are_checked_while_tests_run() -> None:
    """Every other test relies on this: a shape that an annotation forbids raises."""
    with pytest.raises(TypeCheckError, match="noise"):
        velocity(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(TypeCheckError, match="image"):
        velocity(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))
