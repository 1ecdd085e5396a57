"""Every family, on a tiny random transformer and text encoder: what adoption promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from semantic_routing.adopt import Routing, adopt, load_routing
from semantic_routing.adopt.families import FAMILIES
from tests.helpers.adoptable import IDS, LAYERS, MAKERS, MASK, TIMES, Case, make

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # diffusers' own, about Chroma's positions
NAMES = list(MAKERS)
STREAMS = [name for name, family in FAMILIES.items() if family.kind == "stream" or name == "flux2-klein"]
OTHER = (IDS + 7) % 20 + 3


def put(case: Case, **options: Any) -> Routing:
    return adopt(text_encoder=case.encoder, transformer=case.transformer, **options)


def move(routing: Routing, std: float = 0.5) -> None:
    """Give a routing weights as if it was trained."""
    generator = torch.Generator().manual_seed(5)
    for parameter in routing.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)


@torch.no_grad()
def pixels(case: Case, text: Any = None) -> Tensor:
    return case.draw(text)


def test_every_family_has_a_tiny_model() -> None:
    assert set(NAMES) == set(FAMILIES)
    assert len(NAMES) >= 14


@pytest.mark.parametrize("name", NAMES)
def test_pixels_stay_until_weights_move_and_come_back(name: str) -> None:
    case = make(name)
    before = pixels(case)
    routing = put(case)
    assert torch.equal(pixels(case), before)
    computed = case.draw().detach()  # with gradients every block's text is computed
    if name == "semantic-routing":  # in one product for all blocks, whose shape decides the order of its sums
        torch.testing.assert_close(computed, before)
    else:
        assert torch.equal(computed, before)

    move(routing)
    routed = pixels(case)
    assert (routed - before).abs().max() > 1e-4
    assert torch.equal(pixels(case), routed)

    routing.scale = 0
    assert torch.equal(pixels(case), before)
    routing.scale = 1
    assert torch.equal(pixels(case), routed)
    routing.disable()
    assert torch.equal(pixels(case), before)
    routing.enable()
    assert torch.equal(pixels(case), routed)

    routing.remove()
    assert torch.equal(pixels(case), before)
    assert not hooks_left(case)


def hooks_left(case: Case) -> list[str]:
    """Return the names of what still has hooks or attributes of the routing."""
    names = []
    for root in (case.transformer, case.encoder):
        for name, module in root.named_modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if root is case.encoder:  # transformers has hooks of its own, and those of taps stay for good
                hooks = [hook for hook in hooks if hook.__module__.startswith("semantic_routing.adopt")]
            if hooks or hasattr(module, "_routed_text"):
                names.append(f"{type(root).__name__}.{name}")
    function = getattr(case.transformer, "_gradient_checkpointing_func", None)
    wrapped = hasattr(function, "unbound") or hasattr(case.transformer, "semantic_routing")
    return names + ["transformer"] * wrapped


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_reaches_every_row(name: str) -> None:
    case = make(name)
    routing = put(case)
    case.draw().square().mean().backward()
    grad = routing.router.base.logits.grad
    assert grad.shape == (routing.facts.rows, 1 + routing.facts.layers)
    assert (grad.abs().amax(1) > 0).all()
    assert all(p.grad is None for n, p in case.transformer.named_parameters() if "semantic_routing" not in n)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_the_change_of_the_loss(name: str) -> None:
    """Against a difference quotient of the loss, along a direction in all of the routing's numbers."""
    case = make(name)
    routing = put(case, weights="affine")
    logits = routing.router.base.logits
    text, direction, target = case.encode(), torch.randn(logits.shape), torch.randn(pixels(case).shape)

    def loss(step: float) -> Tensor:
        with torch.no_grad():
            logits.copy_(step * direction)
        return (case.draw(text).double() * target).sum()

    loss(0.0).backward()
    slope = (logits.grad * direction).sum().item()
    with torch.no_grad():
        quotient = (loss(0.005) - loss(-0.005)).item() / 0.01
    assert quotient == pytest.approx(slope, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_routing_draws_the_same_pixels(name: str, tmp_path: Path) -> None:
    case = make(name)
    routing = put(case)
    move(routing)
    trained = pixels(case)
    routing.eval()  # records only layers that weigh something
    routed = pixels(case)
    torch.testing.assert_close(routed, trained, rtol=1e-3, atol=1e-4)
    file = routing.save(tmp_path / "counting")
    routing.remove()
    loaded = load_routing(source=tmp_path / "counting", text_encoder=case.encoder, transformer=case.transformer)
    assert torch.equal(pixels(case), routed)
    assert not loaded.training
    assert file.stat().st_size < 20_000


@pytest.mark.parametrize("name", [name for name in NAMES if name != "semantic-routing"])
def test_checkpointed_gradients_are_the_plain_ones(name: str) -> None:
    """With two forward passes of different prompts before the backward pass."""

    def gradient(checkpointed: bool) -> Tensor:
        case = make(name)
        routing = put(case)
        move(routing)
        if checkpointed:
            case.transformer.enable_gradient_checkpointing()
        loss = sum(case.draw(case.encode(ids)).square().mean() for ids in (IDS, OTHER))
        loss.backward()
        routing.remove()
        assert not hooks_left(case)
        return routing.router.base.logits.grad

    assert torch.equal(gradient(True), gradient(False))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("arm", "weights"), [("time", "gate"), ("joint", "simplex"), ("uniform", "gate")])
def test_other_arms(name: str, arm: str, weights: str) -> None:
    """A gate moves all rows at once; weights that depend on time give each sample its own text."""
    case = make(name)
    before = pixels(case)
    routing = put(case, arm=arm, weights=weights)
    assert torch.equal(pixels(case), before)
    move(routing, 0.05 if weights == "simplex" else 0.5)
    routed = pixels(case)
    assert (routed - before).abs().max() > 1e-5
    if arm != "uniform":
        times = routing.weights(torch.tensor([0.3, 0.8]))
        assert times.shape == (2, routing.facts.rows if arm == "joint" else 1, 1 + routing.facts.layers)
        assert not torch.equal(times[0], times[1])
    case.draw().square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in routing.parameters())


@pytest.mark.parametrize("name", STREAMS)
def test_reinjection_needs_no_training(name: str) -> None:
    case = make(name)
    before = pixels(case)
    routing = put(case, arm="reinject")
    assert not list(routing.parameters())
    first = pixels(case)
    assert (first - before).abs().max() > 1e-6
    routing.scale = 4
    assert (pixels(case) - before).abs().max() > (first - before).abs().max()
    routing.scale = 0
    assert torch.equal(pixels(case), before)


@pytest.mark.parametrize("name", STREAMS)
def test_learned_reinjection_starts_at_the_original_too(name: str) -> None:
    case = make(name)
    before = pixels(case)
    routing = put(case, injection="reinject")
    assert torch.equal(pixels(case), before)
    case.draw().square().mean().backward()
    assert (routing.gain.grad != 0).all()
    move(routing)
    assert (pixels(case) - before).abs().max() > 1e-5


def test_the_time_of_a_gate_is_that_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family's timestep becomes t: 0 noise, 1 data."""
    wanted = 1 - TIMES / 1000
    for name in NAMES:
        case = make(name)
        routing = put(case, arm="joint", weights="gate")
        move(routing)
        seen = []
        weights = routing.router.weights

        def watch(t: Tensor, weights: Any = weights, seen: list[Tensor] = seen) -> Tensor:
            seen.append(t)
            return weights(t)

        monkeypatch.setattr(routing.router, "weights", watch)
        pixels(case)
        torch.testing.assert_close(seen[-1], wanted, msg=name)


def test_padding_keeps_the_original_text() -> None:
    """FLUX.2 reads padding; what layers hold there must not depend on how long the longest prompt is."""
    case = make("flux2-klein")
    routing = put(case)
    text = case.encode()
    width = text.shape[-1] // 3
    layers = text[1, MASK[1] == 0].unflatten(-1, (3, width))[..., 16:]
    assert not layers.any()
    assert routing.facts.layers == 28
    assert LAYERS == 4
