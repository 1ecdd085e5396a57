"""Samplers against closed forms, the algebra of guidance, and the text prepared no more often than needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.model.build import make_model
from semantic_routing.model.context import TextContext
from semantic_routing.model.dit import Backbone, DiTConfig
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
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.text.features import TextFeatures

CFG = DiTConfig(
    depth=2, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16, channels=3, text_width=12, text_layers=3,
    fusedit_first_layer=0,
)  # fmt: skip
IMAGE = (3, 4, 6)
TIMED = ("time", "joint")
METHODS = pytest.mark.parametrize("method", [euler, heun])


def model_of(arm: str) -> Backbone:
    """A network whose zero-initialised weights have been moved, as by training."""
    model = make_model(replace(CFG, arm=arm)).requires_grad_(False)
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p, std=0.3)
    return model


def text(lengths: tuple[int, ...], padded_to: int) -> TextFeatures:
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    L, B, N = CFG.text_layers, len(lengths), padded_to
    keys, values = torch.randn(2, L, B, CFG.kv_heads, N, CFG.head_dim)
    return TextFeatures(torch.randn(L, B, N, CFG.text_width), mask, keys, values)


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


def test_shift_above_one_spends_more_steps_near_the_noise() -> None:
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


def test_euler_is_its_recurrence() -> None:
    """x <- (1 + h * rate) x at every step."""
    x = torch.randn(2, 3, dtype=torch.float64)
    found = euler(lambda x, t: -2 * x, x, torch.linspace(0, 1, 6, dtype=torch.float64))
    torch.testing.assert_close(found, x * (1 - 2 / 5) ** 5)


def test_heun_is_its_recurrence_and_ends_with_eulers_step() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    found = heun(lambda x, t: -2 * x, x, torch.linspace(0, 1, 6, dtype=torch.float64))
    z = -2 / 5
    torch.testing.assert_close(found, x * (1 + z + z * z / 2) ** 4 * (1 + z))


@METHODS
def test_the_callback_sees_every_step_as_it_begins(method: Callable) -> None:
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


class Record:
    """What a network was asked: the times at which it prepared text, the sizes of the batches it computed."""

    def __init__(self, model: Backbone) -> None:
        self.prepared: list[Tensor | None] = []
        self.batches: list[int] = []
        prepare = model.prepare_text

        def counted(features: TextFeatures, t: Tensor | None = None) -> TextContext:
            self.prepared.append(t)
            return prepare(features, t)

        model.prepare_text = counted
        model.register_forward_pre_hook(lambda module, inputs: self.batches.append(len(inputs[0])))


def repeated(features: TextFeatures, count: int) -> TextFeatures:
    rows = [0] * count
    return TextFeatures(features.hidden[:, rows], features.mask[rows], features.keys[:, rows], features.values[:, rows])


@pytest.mark.parametrize("arm", PAPER_ARMS)
@pytest.mark.parametrize("null_length", [1, 7])
def test_guidance_is_null_plus_scale_times_the_difference(arm: str, null_length: int) -> None:
    model = model_of(arm)
    prompts, null = text((5, 2), 5), text((null_length,), null_length)
    x, t = torch.randn(2, *IMAGE), torch.tensor([0.7])
    every_null = repeated(null, 2)
    with_prompt, without = text_velocity(model, prompts)(x, t), text_velocity(model, every_null)(x, t)
    assert (with_prompt - without).abs().max() > 1e-3
    for scale in (0.0, 0.5, 3.0, 6.0):
        for nulls in (null, every_null):
            found = guided(model, prompts, nulls, scale)(x, t)
            torch.testing.assert_close(found, without + scale * (with_prompt - without), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided(model, prompts, null, 1.0)(x, t), with_prompt)


def test_scale_one_never_asks_for_the_null_prompt() -> None:
    model = model_of("depth")
    record = Record(model)
    velocity = guided(model, text((5, 2), 5), text((1,), 1), 1.0)
    euler(velocity, torch.randn(2, *IMAGE), schedule(3))
    assert record.batches == [2] * 3
    euler(guided(model, text((5, 2), 5), text((1,), 1), 2.0), torch.randn(2, *IMAGE), schedule(3))
    assert record.batches == [2] * 3 + [4] * 3


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


# --- the text, once ---


@pytest.mark.parametrize("arm", PAPER_ARMS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_is_prepared_once_unless_routing_depends_on_time(arm: str, scale: float, sampler: str) -> None:
    model, steps = model_of(arm), 6
    record = Record(model)
    velocity = guided(model, text((5, 2), 5), text((1,), 1), scale)
    SAMPLERS[sampler](velocity, torch.randn(2, *IMAGE), schedule(steps))
    evaluations = 2 * steps - 1 if sampler == "heun" else steps
    assert len(record.batches) == evaluations
    halves = 1 if scale == 1 else 2
    assert len(record.prepared) == halves * (evaluations if arm in TIMED else 1)
    if arm in TIMED and sampler != "heun":  # at the very time of each step
        for half in range(halves):
            assert [float(t[0]) for t in record.prepared[half::halves]] == schedule(steps)[:-1].tolist()


@pytest.mark.parametrize("budget", [0, 6000, 2**28])
@pytest.mark.parametrize("told", [None, shifted], ids=["nominal", "shifted"])
@pytest.mark.parametrize("arm", TIMED)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_to_come_are_prepared_together(
    arm: str, sampler: str, told: Clock | None, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there is room for, with the same pictures."""
    model, times, x = model_of(arm), schedule(7, 2.0), torch.randn(2, *IMAGE)
    prompts, null = text((5, 2), 5), text((1,), 1)
    fresh = lambda step: torch.full_like(x, step / 10)  # noqa: E731
    expected = SAMPLERS[sampler](guided(model, prompts, null, 3.0, told), x, times, noise=fresh)
    monkeypatch.setattr("semantic_routing.sampling.text_plan.PLANNED_BYTES", budget)
    record, together = Record(model), []
    plan = model.prepare_steps
    model.prepare_steps = lambda features, t: together.append(len(t)) or plan(features, t)
    found = SAMPLERS[sampler](guided(model, prompts, null, 3.0, told, times), x, times, noise=fresh)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if budget == 2**28:
        assert together == [8, 8]
        assert not record.prepared
    elif budget == 0:
        assert not together
    else:
        assert together.count(8) == 1  # the null prompt, which is short
        assert set(together) - {8} <= {2, 3}
        assert len(together) > 3


def test_prepared_steps_are_those_prepared_alone() -> None:
    for arm in PAPER_ARMS:
        model, prompts, times = model_of(arm), text((5, 2), 5), torch.tensor([0.1, 0.5, 0.9])
        for context, t in zip(model.prepare_steps(prompts, times), times, strict=True):
            alone = model.prepare_text(prompts, t[None])
            torch.testing.assert_close(context.keys, alone.keys)
            torch.testing.assert_close(context.values, alone.values)


@pytest.mark.parametrize("arm", PAPER_ARMS)
def test_preparing_once_or_at_every_step_is_the_same(arm: str) -> None:
    """What is reused over steps and halves gives the velocity that a fresh preparation would."""
    model, prompts = model_of(arm), text((5, 2), 5)
    velocity = text_velocity(model, prompts)
    for time in (0.0, 0.4, 0.9):
        x, t = torch.randn(2, *IMAGE), torch.full((2,), time)
        assert torch.equal(velocity(x, t), model(x, t, model.prepare_text(prompts, t)))


# --- noise ---


def test_noise_is_a_function_of_seed_prompt_and_image_alone() -> None:
    names = [(0, 0), (0, 1), (1, 0), (12, 3), (1, 23), (123, 0)]
    together = noise_for(5, names, IMAGE)
    backwards = noise_for(5, names[::-1], IMAGE).flip(0)
    torch.randn(7)  # nor does it depend on, or change, the global generator
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
def test_stochastic_samplers_land_on_what_they_predict_and_renew_the_noise(sampler: Sampler) -> None:
    target, drawn = torch.full((2, 3), 0.5), []

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return (target - x) / (1 - t[:, None])

    def fresh(step: int) -> torch.Tensor:
        drawn.append(step)
        return torch.full((2, 3), float(step + 1))

    seen: list[Tensor] = []
    out = sampler(velocity, torch.randn(2, 3), schedule(4), noise=fresh, callback=lambda i, t, x, v: seen.append(x))
    torch.testing.assert_close(out, target)
    assert drawn == [0, 1, 2]  # none after the last step
    if sampler is renoise:
        torch.testing.assert_close(seen[2], 0.5 * torch.full((2, 3), 2.0) + 0.5 * target)
    else:  # from t = 1/4 to 1/2, (1/2)^2 (1/2)^2 / (3/4)^2 = 1/9 of the noise's variance is kept: 1 and then fresh 2
        noise = (1 / 9) ** 0.5 * 1.0 + (8 / 9) ** 0.5 * 2.0
        torch.testing.assert_close(seen[2], 0.5 * torch.full((2, 3), noise) + 0.5 * target)


MEAN, STD = 0.7, 0.4
"""Of the Gaussian data whose exact denoiser is known in closed form."""


def gain(t: float) -> float:
    """How much the best estimate of the Gaussian's image moves with x_t."""
    return t * STD**2 / ((t * STD) ** 2 + (1 - t) ** 2)


def exact_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    image = MEAN + gain(float(t)) * (x - t * MEAN)
    return (image - x) / (1 - t)


def expected_std(sampler: Sampler, times: list[float]) -> float:
    """The deviation that a stochastic sampler gives the Gaussian: each of its steps is linear in x and fresh noise."""
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
def test_stochastic_samplers_give_a_gaussian_its_closed_forms(sampler: Sampler, steps: int, shift: float) -> None:
    n, times = 20_000, schedule(steps, shift)
    out = sampler(exact_velocity, torch.randn(n, 1), times)
    expected = expected_std(sampler, times.double().tolist())
    assert out.mean().item() == pytest.approx(MEAN, abs=5 * expected / n**0.5)
    assert out.std().item() == pytest.approx(expected, rel=5 / (2 * n) ** 0.5)


def test_the_ancestral_step_converges_to_the_datas_law_and_renoising_does_not() -> None:
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
    with pytest.warns(FutureWarning, match="euler-ancestral is the true"):
        assert SampleConfig(sampler="ancestral") == SampleConfig(sampler="renoise")


def test_renewed_noise_depends_on_the_step_and_not_on_the_batch() -> None:
    both = noise_for(3, [(0, 0), (5, 1)], (2, 2), step=7)
    assert torch.equal(both[1:], noise_for(3, [(5, 1)], (2, 2), step=7))
    assert not torch.equal(both, noise_for(3, [(0, 0), (5, 1)], (2, 2), step=8))
    assert not torch.equal(both, noise_for(3, [(0, 0), (5, 1)], (2, 2)))
