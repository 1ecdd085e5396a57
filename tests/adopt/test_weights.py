"""The adopted forms of weights, and the mix that keeps a token's moments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from semantic_routing.adopt.moments import restyled
from semantic_routing.adopt.weights import FORMS, GateForm, check_arm, make_weights, project_to_simplex
from semantic_routing.model.arms import ARMS

LAYERS, ROWS, WIDTH = 5, 4, 32
LEARNED = ("static", "time", "depth", "joint")
FIXED = ("penultimate", "uniform", "hard")
PAIRS = [(arm, form) for arm in LEARNED for form in FORMS] + [(arm, "gate") for arm in FIXED]
T = torch.tensor([0.0, 0.3, 1.0])


def made(arm: str, form: str) -> torch.nn.Module:
    return make_weights(arm, form, LAYERS, ROWS, WIDTH)


@pytest.mark.parametrize(("arm", "form"), PAIRS)
def test_all_forms_start_exactly_at_the_original_state(arm: str, form: str) -> None:
    weights = made(arm, form).weights(T)
    kind = ARMS[arm]
    assert weights.shape == (3 if kind.by_time else 1, ROWS if kind.by_block else 1, 1 + LAYERS)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, torch.eye(1, 1 + LAYERS).expand_as(weights))


@pytest.mark.parametrize(("arm", "form"), PAIRS)
def test_a_few_steps_lead_to_weights_wanted(arm: str, form: str) -> None:
    """Gradient descent moves every row to the mix of two states that its loss asks for, and weights still sum to 1."""
    router = made(arm, form)
    wanted = torch.zeros(1 + LAYERS)
    wanted[2], wanted[LAYERS] = 0.75, 0.25
    if arm in FIXED:  # only the gate moves
        wanted = router.base.weights(None)
    inner = 0.001 if ARMS[arm].by_time else 0.02  # faster, and a softmax saturates before its gate has opened
    rates = {name: 0.05 if name == "gate" else inner for name, _ in router.named_parameters()}
    groups = [{"params": [p], "lr": rates[name]} for name, p in router.named_parameters()]
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(300):
        loss = (router.weights(T) - wanted).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = router.weights(T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    if arm in FIXED:
        assert (router.gate - 1).abs().max() < 0.05
    else:
        assert min(losses) < 0.05 * losses[0]


@pytest.mark.parametrize("form", ["simplex", "affine"])
def test_the_first_gradient_reaches_all_states(form: str) -> None:
    router = made("depth", form)
    (router.weights() * torch.randn(ROWS, 1 + LAYERS)).sum().backward()
    assert router.base.logits.grad.abs().min() > 0


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    """Against the closed form of its conditions: one threshold for all kept entries, and none kept below it."""
    points = torch.randn(200, 7, dtype=torch.float64) * 2
    found = project_to_simplex(points)
    assert found.min() >= 0
    torch.testing.assert_close(found.sum(-1), torch.ones(200, dtype=torch.float64))
    moved = points - found
    for point, at, weights in zip(points, moved, found, strict=True):
        threshold = at[weights > 0]
        assert threshold.max() - threshold.min() < 1e-12
        assert (point[weights == 0] <= threshold[0] + 1e-12).all()
    vertices = torch.eye(7)
    assert torch.equal(project_to_simplex(vertices), vertices)


def test_the_gate_leads_from_the_original_to_the_inner_router() -> None:
    router = made("uniform", "gate")
    assert isinstance(router, GateForm)
    router.gate.data.fill_(1)
    torch.testing.assert_close(router.weights()[0, 0], torch.full((1 + LAYERS,), 1 / (1 + LAYERS)))


@pytest.mark.parametrize(
    ("arm", "form", "message"),
    [
        ("uniform", "simplex", "weights='gate'"),
        ("depth", "simplx", "did you mean 'simplex'"),
        ("fusedit", "gate", "cannot be adopted: it has no weights"),
        ("attention", "gate", "same for all tokens"),
        ("time-state", "gate", "estimates the time"),
        ("depth-kv", "simplex", "reads one text; known: .*depth"),
        ("depth-heads", "gate", "reads one text"),
        ("depth-heads-kv", "affine", "reads one text"),
        ("depth-low-rank", "simplex", "reads one text"),
        ("dept", "gate", "did you mean 'depth'"),
    ],
)
def test_pairs_that_do_not_exist_are_refused(arm: str, form: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(arm, form)


def test_paper_labels_name_arms_too() -> None:
    assert check_arm("S2") == "depth"


def naive(alpha: Tensor, states: Tensor, origin: int, layers: Tensor) -> Tensor:
    """Return the mix in float64 from its definition: each state with the moments of the original's token."""
    own = states[origin].double()
    mean, sigma = own.mean(-1, keepdim=True), (own.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    stack = torch.stack([own, *layers.double()])
    styled = mean + sigma * F.layer_norm(stack, stack.shape[-1:], eps=1e-5)
    return torch.einsum("bs,sbnc->bnc", alpha.double().expand(own.shape[0], -1), styled)


@pytest.mark.parametrize("width", [32, 24])  # the fused kernel and plain torch
def test_the_mix_is_the_convex_mix_of_restyled_states(width: int) -> None:
    states = torch.randn(1 + LAYERS, 2, 6, width) * 5 + 2
    alpha = torch.randn(2, ROWS, 1 + LAYERS).softmax(-1)
    change = alpha - torch.eye(1, 1 + LAYERS)
    found = list(restyled(change, states, [0] * ROWS, range(1, 1 + LAYERS)))
    for row in range(ROWS):
        expected = naive(alpha[:, row], states, 0, states[1:])
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_may_have_their_own_original_states() -> None:
    """As in families whose blocks read different layers: origins point into the layers, and no state is copied."""
    layers = torch.randn(LAYERS, 2, 6, WIDTH) * 3
    alpha = torch.randn(1, 3, 1 + LAYERS).softmax(-1)
    origins = [4, 0, 2]
    change = alpha - torch.eye(1, 1 + LAYERS)
    found = list(restyled(change, layers, origins, range(1, 1 + LAYERS)))
    for row, origin in enumerate(origins):
        expected = naive(alpha[:, row], layers, origin, layers)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-4, atol=1e-4)


def test_layers_of_no_weight_are_not_needed() -> None:
    states = torch.randn(1 + LAYERS, 2, 6, WIDTH)
    alpha = torch.tensor([[[0.5, 0.0, 0.3, 0.0, 0.2, 0.0]]])
    change = alpha - torch.eye(1, 1 + LAYERS)
    (whole,) = restyled(change, states, [0], range(1, 1 + LAYERS))
    (part,) = restyled(change, states[[0, 2, 4]], [0], [2, 4])
    torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_change_the_state_is_the_original_to_the_last_bit(dtype: torch.dtype) -> None:
    states = (torch.randn(1 + LAYERS, 2, 6, WIDTH) * 40).to(dtype)
    change = torch.zeros(1, 2, 1 + LAYERS, requires_grad=True)
    found = list(restyled(change, states, [0, 3], range(1, 1 + LAYERS)))
    assert torch.equal(found[0], states[0])
    assert torch.equal(found[1], states[3])
    sum(state.float().square().sum() for state in found).backward()
    assert change.grad is not None
    assert change.grad[..., 1:].abs().min() > 0


def test_neutral_tokens_keep_the_original_state() -> None:
    states = torch.randn(1 + LAYERS, 2, 6, WIDTH)
    neutral = torch.zeros(2, 6, dtype=torch.bool)
    neutral[0, 3:] = True
    change = torch.randn(1, 1, 1 + LAYERS)
    (found,) = restyled(change, states, [0], range(1, 1 + LAYERS), neutral)
    assert torch.equal(found[neutral], states[0][neutral])
    assert (found != states[0]).any(-1)[~neutral].all()
