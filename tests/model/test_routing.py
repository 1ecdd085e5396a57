"""Routers and the mix, against Eq. 2 in float64 and Appendix A written with torch's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semantic_routing.model.arms import ARMS, PAPER_ARMS, parse_arm
from semantic_routing.model.kernels.mix import BLOCK_TOKENS
from semantic_routing.model.routing import AttentionRouter, GateRouter, LogitRouter, Router, make_router, mix

ROUTED = [arm for arm in PAPER_ARMS if arm != "fusedit"]
TIMED = ["time", "joint"]
LAYERS, DEPTH, WIDTH = 6, 3, 8


def naive_mix(weights: Tensor, hidden: Tensor) -> Tensor:
    """Compute Eq. 2 as written, in float64: normalise every layer, then add."""
    hidden, weights = hidden.double(), weights.double().expand(hidden.shape[1], -1, -1)
    mean = hidden.mean(-1, keepdim=True)
    var = (hidden - mean).square().mean(-1, keepdim=True)
    normed = (hidden - mean) / (var + 1e-5).sqrt()
    blocks = [
        sum(weights[:, d, layer, None, None] * normed[layer] for layer in range(hidden.shape[0]))
        for d in range(weights.shape[1])
    ]
    return torch.stack(blocks)


def states(*shape: int) -> Tensor:
    """Draw hidden states like a language model's: layers differ in scale, tokens in mean."""
    scale = torch.logspace(-1, 2, shape[0]).reshape(-1, 1, 1, 1)
    return scale * (torch.randn(shape) + 3 * torch.randn(*shape[:3], 1))


def convex(*shape: int) -> Tensor:
    return torch.randn(shape).softmax(-1)


def trained(arm: str) -> Router:
    """Return a router of an arm whose weights have moved, as by training."""
    router = make_router(arm, LAYERS, DEPTH, WIDTH)
    for p in router.parameters():
        nn.init.normal_(p, std=0.2)
    return router


GROUP = BLOCK_TOKENS // 3  # three samples of this length are mixed at a time
SIZES = [  # L B N C D
    (1, 1, 1, 5, 1),
    (5, 3, 7, 13, 4),
    (2, 1, BLOCK_TOKENS - 1, 3, 2),
    (2, 2, BLOCK_TOKENS, 3, 2),
    (3, 2, BLOCK_TOKENS + 1, 3, 2),
    (2, 1, 2 * BLOCK_TOKENS + 3, 3, 1),
    (2, 3, GROUP, 3, 2),
    (2, 4, GROUP, 3, 2),
    (3, 7, GROUP, 3, 2),
    (2, BLOCK_TOKENS + 1, 1, 3, 2),
]


@pytest.mark.parametrize("learning_states", [False, True], ids=["frozen", "states-learn"])
@pytest.mark.parametrize("one_sample", [False, True], ids=["B", "1"])
@pytest.mark.parametrize("one_block", [False, True], ids=["D", "1"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mix_is_equation_2(size: tuple, one_block: bool, one_sample: bool, learning_states: bool) -> None:
    L, B, N, C, D = size
    hidden = states(L, B, N, C).requires_grad_(learning_states)
    weights = convex(1 if one_sample else B, 1 if one_block else D, L).requires_grad_()
    leaves = [weights, hidden] if learning_states else [weights]
    expected = naive_mix(weights, hidden)
    upstream = torch.randn(expected.shape)
    expected_grads = torch.autograd.grad(expected, leaves, upstream.double())

    fused = mix(weights, hidden)
    grads = torch.autograd.grad(fused, leaves, upstream)

    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-5)
    for grad, reference in zip(grads, expected_grads, strict=True):
        scale = reference.abs().max().item()
        torch.testing.assert_close(grad.double(), reference.double(), rtol=1e-4, atol=1e-5 * scale)


def test_mix_of_bfloat16_states_rounds_once() -> None:
    hidden = states(5, 2, 9, 16).bfloat16()
    weights = convex(2, 3, 5).requires_grad_()
    expected = naive_mix(weights, hidden)
    upstream = torch.randn(expected.shape).bfloat16()
    (expected_grad,) = torch.autograd.grad(expected, weights, upstream.double())

    fused = mix(weights, hidden)
    (grad,) = torch.autograd.grad(fused, weights, upstream)

    assert fused.dtype == torch.bfloat16
    # The sums run in float32; only the result is rounded, to 8 significant bits: half a unit is 2^-8 at most.
    torch.testing.assert_close(fused.double(), expected, rtol=2**-8, atol=1e-5)
    # The states and the incoming gradient are exact, so the weights' gradient is as good as in float32.
    torch.testing.assert_close(grad, expected_grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("learning_states", [False, True])
def test_mix_keeps_its_precision_in_autocast(learning_states: bool) -> None:
    hidden, weights = states(5, 2, 9, 16).requires_grad_(learning_states), convex(1, 3, 5).requires_grad_()
    expected = naive_mix(weights, hidden)
    upstream = torch.randn(expected.shape)
    (expected_grad,) = torch.autograd.grad(expected, weights, upstream.double())
    with torch.autocast("cpu", torch.bfloat16):
        fused = mix(weights, hidden)
    (grad,) = torch.autograd.grad(fused, weights, upstream)
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


def test_frozen_states_leave_no_normalised_copy_for_backward() -> None:
    hidden, weights = states(4, 2, 8, 32), convex(1, 3, 4).requires_grad_()
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mix(weights, hidden)
    storages = {x.data_ptr(): x.numel() for x in kept}
    assert storages.pop(hidden.data_ptr()) == hidden.numel()
    assert sum(storages.values()) == 2 * 4 * 2 * 8  # a mean and a deviation for each layer of each token


@pytest.mark.usefixtures("unchecked")
def test_weights_and_layers_must_agree() -> None:
    with pytest.raises(ValueError, match="weights for 5 layers, but 4 layers"):
        mix(convex(1, 1, 5), states(4, 1, 2, 8))


@pytest.mark.parametrize("arm", ROUTED)
def test_weights_are_convex_in_float32_with_axes_of_size_1_where_nothing_varies(arm: str) -> None:
    router, t = trained(arm), torch.linspace(0, 1, 5)
    weights = router.weights(t)
    batch = 5 if arm in TIMED else 1
    depth = DEPTH if arm in ("depth", "joint") else 1
    assert weights.shape == (batch, depth, LAYERS)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(batch, depth))
    assert router.depends_on_time == (arm in TIMED)


@pytest.mark.parametrize("arm", ROUTED)
def test_every_arm_starts_as_the_average_and_b1_as_the_last_but_one(arm: str) -> None:
    weights = make_router(arm, LAYERS, DEPTH, WIDTH).weights(torch.rand(4))
    start = torch.full((LAYERS,), 1 / LAYERS)
    if arm == "penultimate":
        start = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(weights, start.expand_as(weights), rtol=0, atol=1e-7)


@pytest.mark.parametrize("arm", ["penultimate", "uniform"])
def test_fixed_arms_have_nothing_to_learn_or_to_save(arm: str) -> None:
    router = make_router(arm, LAYERS, DEPTH, WIDTH)
    assert not list(router.parameters())
    assert not router.state_dict()
    assert router.weights(torch.rand(2, device="meta")).is_meta, "without a state they are on the device of the time"


@pytest.mark.parametrize("arm", ROUTED)
def test_router_mixes_with_the_weights_it_reports(arm: str) -> None:
    router, hidden, t = trained(arm), states(LAYERS, 2, 5, 8), torch.rand(2)
    fused = router(hidden, t)
    expected = naive_mix(router.weights(t), hidden)
    torch.testing.assert_close(fused.double(), expected, rtol=1e-5, atol=1e-5)


def test_b1_reads_one_layer_only() -> None:
    hidden = states(LAYERS, 2, 5, 8)
    hidden[torch.arange(LAYERS) != LAYERS - 2] = torch.nan
    assert make_router("penultimate", LAYERS, DEPTH, WIDTH)(hidden).isfinite().all()


def test_static_and_depth_weights_are_the_softmax_of_their_logits() -> None:
    for arm, rows in (("static", 1), ("depth", DEPTH)):
        router = trained(arm)
        assert isinstance(router, LogitRouter)
        assert router.logits.shape == (rows, LAYERS)
        z = router.logits.double().exp()
        torch.testing.assert_close(router.weights()[0].double(), z / z.sum(-1, keepdim=True))


def appendix_a(router: GateRouter, gate: int, t: Tensor) -> Tensor:
    """Compute Appendix A in float64: 128 sinusoids (Eq. 12), Linear to 512, SiLU, Linear to L, softmax."""
    net = nn.Sequential(nn.Linear(128, 512), nn.SiLU(), nn.Linear(512, LAYERS)).double()
    values = [router.w1[gate].T, router.b1[gate, 0], router.w2[gate].T, router.b2[gate, 0]]
    with torch.no_grad():
        for p, value in zip(net.parameters(), values, strict=True):
            p.copy_(value)
    omega = [1 / 10000 ** (2 * i / 128) for i in range(64)]
    phi = [[torch.cos(s * w) for w in omega] + [torch.sin(s * w) for w in omega] for s in t.double()]
    return net(torch.tensor(phi, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("arm", TIMED)
def test_gates_are_appendix_a(arm: str) -> None:
    router, t = trained(arm), torch.tensor([0.0, 0.013, 0.5, 0.77, 1.0])
    assert isinstance(router, GateRouter)
    weights = router.weights(t)
    assert weights.std(dim=0).max() > 1e-3, "the weights must vary with time for this test to mean anything"
    for gate in range(weights.shape[1]):
        torch.testing.assert_close(weights[:, gate].double(), appendix_a(router, gate, t), rtol=1e-4, atol=1e-6)


def test_joint_gates_are_independent() -> None:
    router, t = trained("joint"), torch.rand(4)
    before = router.weights(t)
    before[:, 1].square().sum().backward()
    for p in router.parameters():
        assert p.grad[1].abs().sum() > 0
        assert p.grad[[0, 2]].eq(0).all(), "block 1's weights must not reach the other blocks' gates"
        with torch.no_grad():
            p[1] += 1
    after = router.weights(t)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_gates_start_differently_inside_and_within_xavier_bounds() -> None:
    router = GateRouter(LAYERS, gates=2)
    bound = (6 / (128 + 512)) ** 0.5
    assert 0.98 * bound < router.w1.abs().max() <= bound
    assert not torch.equal(router.w1[0], router.w1[1])
    assert all(p.eq(0).all() for p in (router.b1, router.w2, router.b2))


@pytest.mark.parametrize("arm", TIMED)
def test_gates_keep_their_precision_in_autocast(arm: str) -> None:
    router, t = trained(arm), torch.rand(4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router.weights(t)
    assert torch.equal(inside, router.weights(t))


@pytest.mark.parametrize("arm", TIMED)
def test_gates_without_time_say_so(arm: str) -> None:
    with pytest.raises(ValueError, match="pass t"):
        make_router(arm, LAYERS, DEPTH, WIDTH).weights()


@pytest.mark.parametrize(
    ("layers", "depth", "read"), [(6, 3, [2, 4, 6]), (36, 24, None), (4, 8, [1, 1, 2, 2, 2, 3, 4, 4]), (5, 1, [5])]
)
def test_a_hard_route_reads_one_layer_a_block_from_shallow_to_deep(
    layers: int, depth: int, read: list[int] | None
) -> None:
    router = make_router("hard", layers, depth, WIDTH)
    weights = router.weights()[0]
    chosen = weights.argmax(-1) + 1
    assert torch.equal(weights, torch.eye(layers)[chosen - 1])
    assert (chosen.diff() >= 0).all()
    assert chosen[-1] == layers
    assert not list(router.parameters())
    if read is not None:
        assert chosen.tolist() == read


def test_attention_over_layers_is_its_formula_and_starts_as_the_average() -> None:
    hidden = states(LAYERS, 2, 5, WIDTH)
    router = make_router("attention", LAYERS, DEPTH, WIDTH)
    average = make_router("uniform", LAYERS, DEPTH, WIDTH)
    torch.testing.assert_close(router(hidden), average(hidden))
    router = trained("attention")
    assert isinstance(router, AttentionRouter)
    normed = F.layer_norm(hidden.double(), (WIDTH,))
    scores = torch.einsum("lbnc,c->bnl", normed, router.query.double()) / WIDTH**0.5 + router.bias.double()
    expected = torch.einsum("bnl,lbnc->bnc", scores.softmax(-1), normed)
    fused = router(hidden)
    assert fused.shape == (1, 2, 5, WIDTH)
    torch.testing.assert_close(fused[0].double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="differ from token to token"):
        router.weights()


def test_the_gradient_of_attention_over_layers_is_autograds() -> None:
    hidden, router = states(LAYERS, 2, 5, WIDTH), trained("attention")
    out = torch.randn(1, 2, 5, WIDTH)
    found = torch.autograd.grad((router(hidden) * out).sum(), list(router.parameters()))
    normed = F.layer_norm(hidden, (WIDTH,))
    plain = torch.einsum("bnl,lbnc->bnc", router.token_weights(hidden), normed)
    expected = torch.autograd.grad((plain * out[0]).sum(), list(router.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_arm_names_and_labels() -> None:
    labels = ["B1", "b2", "B3", "S1", "s2", "S3", "FuseDiT"]
    assert [parse_arm(label) for label in labels] == list(PAPER_ARMS)
    assert [parse_arm(arm) for arm in ARMS] == list(ARMS)
    with pytest.raises(ValueError, match=r"unknown arm 'Detph'; did you mean 'depth'\?"):
        parse_arm("Detph")
    with pytest.raises(ValueError, match="unknown arm 'xyz'; known: penultimate, uniform"):
        parse_arm("xyz")


def test_arms_without_router_and_too_few_layers_are_errors() -> None:
    with pytest.raises(ValueError, match="arm 'fusedit' has no router"):
        make_router("fusedit", LAYERS, DEPTH, WIDTH)
    with pytest.raises(ValueError, match="at least 2 language-model layers, not 1"):
        make_router("penultimate", 1, DEPTH, WIDTH)


def test_layer_norm_here_is_torchs() -> None:
    """The reference above and torch agree on LayerNorm without affine part, also for tiny variances."""
    hidden = 1e-3 * torch.randn(1, 2, 3, 8, dtype=torch.float64)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(naive_mix(one, hidden)[0], F.layer_norm(hidden[0], (8,)))
    torch.testing.assert_close(mix(one.float(), hidden.float())[0], F.layer_norm(hidden[0].float(), (8,)))
