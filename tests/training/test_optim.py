"""Optimisers: which weights each takes, at what rate, and one step of each against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from semantic_routing.model.dit import DiT
from semantic_routing.training.optim import BatchedMuon, OptimConfig, make_optimizers, orthogonal, set_rates
from tests.helpers.networks import tiny_config

CFG = tiny_config(depth=2, conditioning="adaln-zero")


def groups(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, tuple[type[Optimizer], float, float]]:
    """By weight: the kind of its optimiser, its full rate and its decay."""
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: (type(o), group["base_lr"], group["weight_decay"])
        for o in optimizers
        for group in o.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize(("router_lr", "rate"), [(None, 0.3), (0.0, 0.0), (0.5, 0.5)])
def test_adamw_takes_all_and_spares_the_router_the_decay(router_lr: float | None, rate: float) -> None:
    model = DiT(CFG)
    found = groups(model, make_optimizers(model, OptimConfig(lr=0.3, router_lr=router_lr, weight_decay=0.2)))
    expected = {name: (AdamW, 0.3, 0.2) for name, _ in model.named_parameters()}
    assert found == expected | {"router.logits": (AdamW, rate, 0.0)}


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = DiT(CFG)
    found = groups(model, make_optimizers(model, OptimConfig(name="muon", lr=0.3, muon_lr=0.7)))
    assert set(found) == {name for name, _ in model.named_parameters()}
    taken = {name for name, (kind, _, _) in found.items() if issubclass(kind, Muon)}
    matrices = ("attn.qkv", "attn.out", "cross.q", "cross.kv", "cross.out", "mlp.gate_up", "mlp.down")
    assert taken == {f"blocks.{block}.{name}.weight" for block in range(2) for name in matrices}
    assert {found[name][1] for name in taken} == {0.7}


def test_a_model_without_router_or_matrices() -> None:
    model = nn.Linear(2, 2)
    assert [type(o) for o in make_optimizers(model, OptimConfig(name="muon"))] == [AdamW]


def test_first_step_of_adamw() -> None:
    """Bias correction makes the first step lr * sign(g), beside the decoupled decay."""
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    (optimizer,) = make_optimizers(model, OptimConfig(lr=0.1, weight_decay=0.5))
    gradient = torch.randn(3, 4)
    model.weight.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before * (1 - 0.1 * 0.5) - 0.1 * gradient.sign())


@pytest.mark.parametrize("bfloat16", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_first_step_of_muon_is_orthogonal(
    shape: tuple[int, int], bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times lr and sqrt(max(1, rows / columns)), all singular values alike: about 1 by Newton-Schulz."""
    monkeypatch.setattr("semantic_routing.training.optim.has_bfloat16", lambda device: bfloat16)
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False)])})
    weight = next(model.parameters())
    before = weight.detach().clone()
    optimizers = make_optimizers(model, OptimConfig(name="muon", muon_lr=0.1, weight_decay=0.0))
    gradient = torch.randn(shape)
    weight.grad = gradient.clone()
    optimizers[-1].step()
    step = (before - weight.detach()) / (0.1 * math.sqrt(max(1, shape[0] / shape[1])))
    values = torch.linalg.svdvals(step)
    assert ((values > 0.6) & (values < 1.3)).all()
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95


@pytest.mark.parametrize("elements", [1, 100, 2**26])
def test_muon_by_batches_is_torchs_own(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bitwise, over steps, for matrices of several shapes however many of them fit a batch."""
    monkeypatch.setattr("semantic_routing.training.optim.has_bfloat16", lambda device: True)  # torch's is in bfloat16
    monkeypatch.setattr("semantic_routing.training.optim.BATCH_ELEMENTS", elements)
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5), (4, 6), (6, 4)]
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.3, "adjust_lr_fn": "original"}
    optimizers = BatchedMuon(ours, **settings), Muon(theirs, **settings)
    for step in range(4):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            skipped = i == step  # a weight without a gradient stays
            a.grad = None if skipped else torch.randn(shapes[i])
            b.grad = None if skipped else a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


def test_muon_iterates_in_float32_without_bfloat16_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(2, 5, 7)
    for there, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("semantic_routing.training.optim.has_bfloat16", lambda device, there=there: there)
        assert orthogonal(matrices).dtype == dtype


STEPS = 10


@pytest.mark.parametrize(
    ("decay", "factors"),
    [
        ("constant", [1.0] * STEPS),
        ("linear", [1 - k / STEPS for k in range(STEPS)]),
        ("cosine", [(1 + math.cos(math.pi * k / STEPS)) / 2 for k in range(STEPS)]),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_rates_are_a_function_of_the_step(decay: str, factors: list[float], warmup: int) -> None:
    cfg = OptimConfig(name="muon", lr=0.3, muon_lr=0.7, router_lr=0.1, warmup=warmup, decay=decay)
    model = DiT(CFG)
    optimizers = make_optimizers(model, cfg)
    full = {0.3, 0.7, 0.1}
    for step in [*range(STEPS), 3]:  # back at 3: nothing is remembered
        expected = factors[step] * min(1, (step + 1) / warmup if warmup else 1)
        assert set_rates(optimizers, cfg, step, step / STEPS) == pytest.approx(expected)
        rates = sorted(group["lr"] for o in optimizers for group in o.param_groups)
        assert rates == pytest.approx(sorted(rate * expected for rate in full))
