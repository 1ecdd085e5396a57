"""Samplers against closed forms, the algebra of guidance, and how often text is prepared."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.sampling.clock import Clock, shifted
from semantic_routing.sampling.guidance import guided, join, text_velocity
from semantic_routing.sampling.samplers import (
    SAMPLERS,
    Sampler,
    euler,
    euler_ancestral,
    heun,
    noise_for,
    renoise,
    schedule,
)
from semantic_routing.sampling.text_plan import TextPlan
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.text.features import TextFeatures
from tests.helpers.networks import TINY, CountingModel, tiny_network

IMAGE = (3, 4, 6)
TIMED = ("time", "joint")
METHODS = pytest.mark.parametrize("method", [euler, heun])


def text(lengths: tuple[int, ...], padded_to: int) -> TextFeatures:
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    L, B, N = TINY.text_layers, len(lengths), padded_to
    keys, values = torch.randn(2, L, B, TINY.kv_heads, N, TINY.head_dim)
    return TextFeatures(torch.randn(L, B, N, TINY.text_width), mask, keys, values)


# --- times ---


@pytest.mark.parametrize("shift", [0.1, 0.3, 1.0, 3.0, 7.7])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_schedule_is_the_shifted_line(steps: int, shift: float) -> None:
    times = schedule(steps, shift)
    assert times.dtype == torch.float32
    assert (times[0], times[-1]) == (0, 1)
    assert (times.diff() > 0).all()
    for k, t in enumerate(times.tolist()):
        sigma = 1 - k / steps
        assert 1 - t == pytest.approx(shift * sigma / (1 + (shift - 1) * sigma), abs=1e-7)


def test_a_shift_above_one_puts_more_steps_near_the_noise() -> None:
    assert (schedule(10, 3.0)[1:-1] < schedule(10)[1:-1]).all()


def test_a_schedule_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1 step, not 0"):
        schedule(0)


# --- integrators ---


@METHODS
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_constant_velocity_is_integrated_exactly(method: Callable, steps: int, shift: float) -> None:
    x, v = torch.randn(2, 3, *IMAGE, dtype=torch.float64)
    torch.testing.assert_close(method(lambda x, t: v, x, schedule(steps, shift).double()), x + v)


def errors(method: Callable, velocity: Callable, exact: Callable[[Tensor], Tensor]) -> list[float]:
    x = torch.randn(2, 3, dtype=torch.float64)
    times = [torch.linspace(0, 1, steps + 1, dtype=torch.float64) for steps in (20, 40, 80, 160)]
    return [float((method(velocity, x, t) - exact(x)).abs().max()) for t in times]


@pytest.mark.parametrize(("method", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("rate", [-1.5, 0.7])
def test_order_of_convergence_on_a_linear_equation(method: Callable, order: int, rate: float) -> None:
    """dx/dt = rate * x + t, whose solution is known: halving the step divides the error by 2^order."""

    def exact(x: Tensor) -> Tensor:
        return (x + 1 / rate**2) * math.exp(rate) - (1 + rate) / rate**2

    found = errors(method, lambda x, t: rate * x + t[:, None], exact)
    rates = [math.log2(a / b) for a, b in pairwise(found)]
    assert rates == pytest.approx([order] * 3, abs=0.15)
    assert found[-1] < 0.05


def test_euler_equals_its_recurrence() -> None:
    """x <- (1 + h * rate) x at every step."""
    x = torch.randn(2, 3, dtype=torch.float64)
    found = euler(lambda x, t: -2 * x, x, torch.linspace(0, 1, 6, dtype=torch.float64))
    torch.testing.assert_close(found, x * (1 - 2 / 5) ** 5)


def test_heun_equals_its_recurrence_and_ends_with_eulers_step() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    found = heun(lambda x, t: -2 * x, x, torch.linspace(0, 1, 6, dtype=torch.float64))
    z = -2 / 5
    torch.testing.assert_close(found, x * (1 + z + z * z / 2) ** 4 * (1 + z))


@METHODS
def test_the_callback_gets_the_beginning_of_every_step(method: Callable) -> None:
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    times = schedule(4, 2.0)
    x = torch.randn(2, 3)
    end = method(lambda x, t: -x + t[:, None], x, times, callback=lambda i, t, x, v: seen.append((i, float(t), x, v)))
    assert [(i, t) for i, t, _, _ in seen] == list(enumerate(times[:-1].tolist()))
    assert torch.equal(seen[0][2], x)
    for (_, t, x, v), after in zip(seen, [*(s[2] for s in seen[1:]), end], strict=True):
        torch.testing.assert_close(v, -x + t)
        assert not torch.equal(x, after)
    if method is euler:
        torch.testing.assert_close(end, seen[-1][2] + (1 - seen[-1][1]) * seen[-1][3])


# --- guidance ---


def repeated(features: TextFeatures, count: int) -> TextFeatures:
    rows = [0] * count
    return TextFeatures(features.hidden[:, rows], features.mask[rows], features.keys[:, rows], features.values[:, rows])


@pytest.mark.parametrize("arm", PAPER_ARMS)
@pytest.mark.parametrize("null_length", [1, 7])
def test_guidance_is_null_plus_scale_times_the_difference(arm: str, null_length: int) -> None:
    model = tiny_network(arm, std=0.3)
    prompts, null = text((5, 2), 5), text((null_length,), null_length)
    every_null = repeated(null, 2)
    steps = []
    for t in (torch.tensor([0.2]), torch.tensor([0.7])):
        x = torch.randn(2, *IMAGE)
        with_prompt, without = (model(x, t, model.prepare_text(half, t)) for half in (prompts, every_null))
        assert (with_prompt - without).abs().max() > 1e-3
        steps.append((x, t, with_prompt, without))
    for scale in (0.0, 0.5, 1.0, 3.0, 6.0):
        for nulls in (null, every_null):
            velocity = guided(model, prompts, nulls, scale)
            for x, t, with_prompt, without in steps:
                expected = without + scale * (with_prompt - without)
                torch.testing.assert_close(velocity(x, t), expected, rtol=1e-4, atol=1e-5)


def test_at_scale_one_only_the_prompts_are_computed() -> None:
    for scale, rows in ((1.0, 2), (2.0, 4)):
        model = tiny_network("depth", std=0.3)
        counting = CountingModel(model)
        euler(guided(model, text((5, 2), 5), text((1,), 1), scale), torch.randn(2, *IMAGE), schedule(3))
        assert counting.rows == [rows] * 3


@pytest.mark.parametrize(("first", "second"), [(5, 3), (3, 5), (4, 4)])
def test_join_pads_to_the_longer_and_keeps_every_token(first: int, second: int) -> None:
    a, b = text((first, 2), first), text((second,), second)
    both = join(a, b)
    longest = max(first, second)
    assert both.mask.sum(1).tolist() == [first, 2, second, second]
    assert both.mask.shape == (4, longest)
    for name in ("hidden", "keys", "values"):
        x, left, right = (getattr(f, name) for f in (both, a, b))
        assert torch.equal(x[:, :2][..., :first, :], left)
        assert torch.equal(x[:, 2:][..., :second, :], right.expand(-1, 2, *right.shape[2:]))
    assert join(TextFeatures(a.hidden, a.mask), TextFeatures(b.hidden, b.mask)).keys is None


# --- how often text is prepared ---


def change(*texts: TextFeatures) -> None:
    """Change features after a network may have read them; tensors that it has read stay as they are."""
    for features in texts:
        vars(features).update(hidden=-features.hidden, keys=-features.keys, values=-features.values)


@pytest.mark.parametrize("arm", PAPER_ARMS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_is_prepared_once_unless_routing_depends_on_time(arm: str, scale: float, sampler: str) -> None:
    """Features that change after the first evaluation change the result only if they are read again."""
    model, steps, x = tiny_network(arm, std=0.3), 3, torch.randn(2, *IMAGE)
    prompts, null = text((5, 2), 5), text((1,), 1)
    counting = CountingModel(model)

    def sample(*, changed: bool) -> Tensor:
        given = deepcopy((prompts, null))

        def callback(step: int, *state: Tensor) -> None:
            if changed and step == 0:
                change(*given)

        velocity = guided(model, *given, scale)
        return SAMPLERS[sampler](velocity, x, schedule(steps), noise=lambda step: x, callback=callback)

    expected = sample(changed=False)
    assert counting.calls == (2 * steps - 1 if sampler == "heun" else steps)
    assert torch.equal(sample(changed=True), expected) is (arm not in TIMED)


@pytest.mark.parametrize("clock", [None, shifted], ids=["nominal", "shifted"])
@pytest.mark.parametrize("arm", TIMED)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_prepared_ahead_gives_the_same_images(arm: str, sampler: str, clock: Clock | None) -> None:
    model, times, x = tiny_network(arm, std=0.3), schedule(4, 2.0), torch.randn(2, *IMAGE)
    prompts, null = text((5, 2), 5), text((1,), 1)
    found, expected = (
        SAMPLERS[sampler](guided(model, prompts, null, 3.0, clock, known), x, times, noise=lambda step: x * step / 10)
        for known in (times, None)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = SAMPLERS[sampler](guided(model, prompts, null, 3.0, lambda t: t / 2), x, times, noise=lambda step: x)
    assert not torch.allclose(other, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("arm", TIMED)
def test_text_is_prepared_ahead_for_as_many_steps_as_fit_the_budget(arm: str, steps: int) -> None:
    """A change of the features after the first step changes only steps whose text was not prepared ahead."""
    model, times, x = tiny_network(arm, std=0.3), schedule(8)[:-1], torch.randn(2, *IMAGE)
    prompts = text((5, 2), 5)
    expected = [TextPlan(model, prompts).at(x, t[None]) for t in times]
    blocks = zip(expected[0].keys, expected[0].values, strict=True)
    mixed = prompts.hidden[0].nbytes * (model.cfg.depth if arm == "joint" else 1)
    step = mixed + sum(keys.nbytes + values.nbytes for keys, values in blocks)

    def prepared_at_the_first_step(budget: int) -> int:
        given = deepcopy(prompts)
        plan = TextPlan(model, given, times=times, budget=budget)
        plan.at(x, times[:1])
        change(given)
        same = [torch.allclose(plan.at(x, t[None]).values[0], context.values[0], rtol=1e-4)
                for t, context in zip(times[1:], expected[1:], strict=True)]  # fmt: skip
        assert same == sorted(same, reverse=True)
        return 1 + sum(same)

    assert prepared_at_the_first_step(steps * step) == steps
    assert prepared_at_the_first_step(steps * step - 1) == max(steps - 1, 1)


def test_steps_prepared_together_equal_steps_prepared_alone() -> None:
    for arm in PAPER_ARMS:
        model, prompts, times = tiny_network(arm, std=0.3), text((5, 2), 5), torch.tensor([0.1, 0.5, 0.9])
        for context, t in zip(model.prepare_steps(prompts, times), times, strict=True):
            alone = model.prepare_text(prompts, t[None])
            torch.testing.assert_close(context.keys, alone.keys)
            torch.testing.assert_close(context.values, alone.values)


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_the_velocity_equals_one_with_freshly_prepared_text(arm: str) -> None:
    model, prompts = tiny_network(arm, std=0.3), text((5, 2), 5)
    velocity = text_velocity(model, prompts)
    for time in (0.0, 0.4, 0.9):
        x, t = torch.randn(2, *IMAGE), torch.full((2,), time)
        assert torch.equal(velocity(x, t), model(x, t, model.prepare_text(prompts, t)))


# --- noise ---


def test_noise_depends_only_on_seed_prompt_and_image() -> None:
    names = [(0, 0), (0, 1), (1, 0), (12, 3), (1, 23), (123, 0)]
    together = noise_for(5, names, IMAGE)
    backwards = noise_for(5, names[::-1], IMAGE).flip(0)
    torch.randn(7)  # neither depends on nor changes the global generator
    alone = torch.cat([noise_for(5, [name], IMAGE) for name in names])
    assert torch.equal(together, backwards)
    assert torch.equal(together, alone)
    rows = torch.cat([together, noise_for(6, names, IMAGE)]).flatten(1)
    assert len({tuple(row.tolist()) for row in rows}) == 2 * len(names)


def test_noise_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    noise_for(0, [(0, 0)], IMAGE)
    assert torch.equal(torch.rand(3), expected)


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = noise_for(0, [(p, i) for p in range(20) for i in range(2)], (3, 16, 16)).flatten(1)
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 / n**0.5
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / n) ** 0.5)
    between = torch.corrcoef(noise) - torch.eye(len(noise))
    assert float(between.abs().max()) < 5.5 / noise.shape[1] ** 0.5


@pytest.mark.parametrize("sampler", [renoise, euler_ancestral])
def test_stochastic_samplers_end_at_their_prediction_and_replace_the_noise(sampler: Sampler) -> None:
    target, drawn = torch.full((2, 3), 0.5), []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (target - x) / (1 - t[:, None])

    def fresh(step: int) -> torch.Tensor:
        drawn.append(step)
        return torch.full((2, 3), float(step + 1))

    seen: list[Tensor] = []
    out = sampler(velocity, torch.randn(2, 3), schedule(4), noise=fresh, callback=lambda i, t, x, v: seen.append(x))
    torch.testing.assert_close(out, target)
    assert drawn == [0, 1, 2]  # not after the last step
    if sampler is renoise:
        torch.testing.assert_close(seen[2], 0.5 * torch.full((2, 3), 2.0) + 0.5 * target)
    else:  # from t = 1/4 to 1/2, (1/2)^2 (1/2)^2 / (3/4)^2 = 1/9 of the noise's variance is kept: 1 and then fresh 2
        noise = (1 / 9) ** 0.5 * 1.0 + (8 / 9) ** 0.5 * 2.0
        torch.testing.assert_close(seen[2], 0.5 * torch.full((2, 3), noise) + 0.5 * target)


MEAN, STD = 0.7, 0.4
"""Mean and standard deviation of Gaussian data, whose exact denoiser has a closed form."""


def gain(t: float) -> float:
    """Return the derivative of the best estimate of the image with respect to x_t."""
    return t * STD**2 / ((t * STD) ** 2 + (1 - t) ** 2)


def exact_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    image = MEAN + gain(float(t)) * (x - t * MEAN)
    return (image - x) / (1 - t)


def expected_std(sampler: Sampler, times: list[float]) -> float:
    """Return the standard deviation of a stochastic sampler's results, whose steps are linear in x and noise."""
    variance = 1.0
    for t, s in pairwise(times):
        if s == 1:
            return gain(t) * variance**0.5
        kept = 0.0 if sampler is renoise else t * (1 - s) / (s * (1 - t))
        # x_s = s (MEAN + g (x - t MEAN)) + (1 - s) kept (x - t image) / (1 - t) + fresh
        linear = s * gain(t) + (1 - s) * kept * (1 - t * gain(t)) / (1 - t)
        variance = linear**2 * variance + (1 - s) ** 2 * (1 - kept**2)
    raise AssertionError("the last time is 1")


@pytest.mark.parametrize("shift", [1.0, 4.0])
@pytest.mark.parametrize("steps", [2, 25, 400])
@pytest.mark.parametrize("sampler", [renoise, euler_ancestral])
def test_stochastic_samplers_match_closed_forms_on_a_gaussian(sampler: Sampler, steps: int, shift: float) -> None:
    n, times = 20_000, schedule(steps, shift)
    out = sampler(exact_velocity, torch.randn(n, 1), times)
    expected = expected_std(sampler, times.double().tolist())
    assert out.mean().item() == pytest.approx(MEAN, abs=5 * expected / n**0.5)
    assert out.std().item() == pytest.approx(expected, rel=5 / (2 * n) ** 0.5)


def test_the_ancestral_step_converges_to_the_data_distribution_and_renoising_does_not() -> None:
    times = schedule(1600).double().tolist()
    assert expected_std(euler_ancestral, times) == pytest.approx(STD, abs=0.002)
    assert expected_std(renoise, times) == pytest.approx(0.28, abs=0.005)


@pytest.mark.parametrize("sampler", [euler, heun])
def test_deterministic_samplers_converge_to_a_gaussian(sampler: Sampler) -> None:
    n = 20_000
    x = torch.randn(n, 1)
    out = sampler(exact_velocity, x, schedule(400))
    torch.testing.assert_close(out, MEAN + STD * x, atol=0.01, rtol=0)  # the flow of a Gaussian is linear


def test_the_old_spelling_of_renoise_is_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="is now called renoise"):
        assert SampleConfig(sampler="ancestral") == SampleConfig(sampler="renoise")


def test_fresh_noise_depends_on_the_step_and_not_on_the_batch() -> None:
    both = noise_for(3, [(0, 0), (5, 1)], (2, 2), step=7)
    assert torch.equal(both[1:], noise_for(3, [(5, 1)], (2, 2), step=7))
    assert not torch.equal(both, noise_for(3, [(0, 0), (5, 1)], (2, 2), step=8))
    assert not torch.equal(both, noise_for(3, [(0, 0), (5, 1)], (2, 2)))
