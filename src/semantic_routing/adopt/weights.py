"""Weights over states that start exactly at the state that the model originally reads: gate, simplex and affine forms.

State 0 is the original state, states 1 to L are the language model's layers, and δ is the one-hot vector of state 0. A
softmax cannot start there, because its gradient vanishes before its other weights do. Each form turns the output of a
router of this program into weights that are bitwise δ at first and that have a gradient.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from semantic_routing.common.config import nearest
from semantic_routing.model.arms import ARMS, parse_arm
from semantic_routing.model.routing import FixedRouter, GateRouter, LogitRouter, Router, make_router

Form = Literal["simplex", "gate", "affine"]
FORMS: tuple[Form, ...] = get_args(Form)
REINJECT = "reinject"
"""The arm without a router: every block reads the original state, which is added to the text again."""


class AdoptedRouter(Router):
    """Weights over 1 + L states that are the one-hot vector of state 0 until they are trained."""

    def __init__(self, base: Router) -> None:
        super().__init__()
        self.base = base
        self.depends_on_time = base.depends_on_time

    def _from_original(self, weights: Float[Tensor, "B_or_1 D_or_1 S"]) -> Float[Tensor, "B_or_1 D_or_1 S"]:
        """Return δ in the shape of ``weights``."""
        original = torch.zeros_like(weights)
        original[..., 0] = 1
        return original


class GateForm(AdoptedRouter):
    """δ + g (w - δ) with the weights w of any router and one gate g for each of its rows, 0 at first.

    Convex for 0 <= g <= 1. The first gradient reaches only g, as it reaches only the second matrix of a LoRA.
    """

    def __init__(self, base: Router, rows: int) -> None:
        super().__init__(base)
        self.gate = nn.Parameter(torch.zeros(rows, 1))

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 S"]:
        inner = self.base.weights(t).to(self.gate.device)
        original = self._from_original(inner)
        return original + self.gate.float() * (inner - original)


class SimplexForm(AdoptedRouter):
    """Projection of δ + z onto the simplex, with a straight-through gradient; z are a router's logits, 0 at first.

    The weights are always convex and become sparse, and the first gradient reaches all states. Following the
    straight-through gradient is dual averaging: z accumulates gradients, and the projection keeps the weights feasible.
    """

    base: LogitRouter | GateRouter

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 S"]:
        z = self.base.scores(t)
        return _Project.apply(self._from_original(z) + z)


class AffineForm(AdoptedRouter):
    """δ + z - mean(z) with a router's logits z, 0 at first: weights with the sum 1 that may be negative.

    For models whose own mix of layers has weights of both signs.
    """

    base: LogitRouter | GateRouter

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 S"]:
        z = self.base.scores(t)
        return self._from_original(z) + (z - z.mean(-1, keepdim=True))


class OriginalRouter(Router):
    """δ for all blocks, without parameters: the router of the arm ``reinject``."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.states = states

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 S"]:
        return torch.eye(1, self.states, device=None if t is None else t.device)[None]


class _Project(torch.autograd.Function):
    """The projection onto the simplex, with the gradient of the projection onto the plane where weights sum to 1."""

    @staticmethod
    def forward(ctx: Any, points: Tensor) -> Tensor:
        return project_to_simplex(points)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(-1, keepdim=True)


def project_to_simplex(points: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows S"]:
    """Return the nearest point of the simplex to each row (Duchi et al., 2008, Algorithm 1).

    The vertices of the simplex are returned bitwise unchanged.
    """
    ordered = points.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, points.shape[-1] + 1, device=points.device, dtype=points.dtype)
    kept = (ordered - excess / count > 0).sum(-1, keepdim=True)
    threshold = excess.gather(-1, kept - 1) / kept
    return (points - threshold).clamp_min(0)


def make_weights(arm: str, form: str, layers: int, rows: int, width: int) -> Router:
    """Return the router of an arm over ``1 + layers`` states for ``rows`` blocks, in its adopted form.

    Raises ValueError for an unknown arm or form, and for pairs that do not exist.
    """
    states = 1 + layers
    if arm == REINJECT:
        return OriginalRouter(states)
    kind = ARMS[check_arm(arm)]
    if form not in FORMS:
        raise ValueError(f"unknown weights {form!r}; {nearest(form, list(FORMS))}")
    base = make_router(kind.name, states, rows, width)
    if form == "gate":
        return GateForm(base, rows if kind.by_block else 1)
    if isinstance(base, FixedRouter):
        raise ValueError(f"the weights of arm {kind.name!r} are fixed, so only a gate can be trained: weights='gate'")
    assert isinstance(base, LogitRouter | GateRouter)
    return SimplexForm(base) if form == "simplex" else AffineForm(base)


def check_arm(arm: str) -> str:
    """Return an arm's name; raise ValueError for an arm that cannot be adopted, and say which can."""
    if arm == REINJECT:
        return arm
    adoptable = [
        name for name, kind in ARMS.items() if kind.has_weights and not kind.finer and kind.time_from == "nominal"
    ]
    name = parse_arm(arm)
    if name not in adoptable:
        why = "has no weights over layers that are the same for all tokens"
        if ARMS[name].finer:
            why = "mixes layers for keys, values or heads apart, but a block of a pipeline reads one text"
        elif ARMS[name].has_weights:
            why = "estimates the time from this program's own latents"
        raise ValueError(f"arm {name!r} cannot be adopted: it {why}; known: {', '.join([*adoptable, REINJECT])}")
    return name
