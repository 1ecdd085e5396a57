"""Conversion of a network to another arm that can represent the same routing: S2 as a finer arm, and back."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.model.arms import ARMS, Arm, parse_arm
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiT
from semantic_routing.model.routing import FixedRouter, LogitRouter, LowRankRouter, cosines

ALIKE = 1e-6
"""Largest difference of weights that are considered equal."""
AXES = ("blocks", "keys and values of a block", "heads of a block")


def changeable(arm: Arm) -> bool:
    """Return whether an arm's weights are constant and positive, so that logits can express them."""
    return arm.name == "uniform" or (arm.learned and not (arm.by_time or arm.by_token))


def change_arm(model: Backbone, arm: str) -> Backbone:
    """Return a network of another arm with the same routing weights; all other weights are shared.

    Converting a coarser arm to a finer one is exact (uniform, static, depth, then separate keys, values and heads of
    each block). Raises ValueError if the other arm cannot represent these weights: because blocks or parts of blocks
    differ that it does not distinguish, or because one of the two arms has no constant logits.
    """
    arm = parse_arm(arm)
    for name in (model.cfg.arm, arm):
        if not changeable(ARMS[name]):
            known = ", ".join(name for name, kind in ARMS.items() if changeable(kind))
            raise ValueError(f"arm {name!r} has no constant logits to convert; arms that have are {known}")
    with torch.device("meta"):
        changed = make_model(replace(model.cfg, arm=arm))
    kept = {name: x for name, x in model.state_dict().items() if not name.startswith("router.")}
    own = _router_state(_logits(model), changed)
    changed.load_state_dict(kept | {f"router.{name}": x for name, x in own.items()}, assign=True)
    return changed


def _logits(model: Backbone) -> Float[Tensor, "D_or_1 S_or_1 H_or_1 L"]:
    """Return a network's logits by block, side (keys, values) and head."""
    assert isinstance(model, DiT)
    router, split = model.router, model.cfg.strategy.split(model.cfg.kv_heads)
    if isinstance(router, LowRankRouter):
        return router.logits().detach().unflatten(0, (-1, *split))
    if isinstance(router, LogitRouter):
        return router.logits.detach().unflatten(0, (-1, *split))
    assert isinstance(router, FixedRouter)
    return torch.zeros(1, 1, 1, model.cfg.text_layers)


def _router_state(logits: Float[Tensor, "D_or_1 S_or_1 H_or_1 L"], target: Backbone) -> dict[str, Tensor]:
    """Return the state of the target's router that gives these logits."""
    cfg, arm = target.cfg, target.cfg.strategy
    sides, heads = (1, 1) if arm.low_rank else arm.split(cfg.kv_heads)
    wanted = (cfg.depth if arm.by_block else 1, sides, heads)
    for axis, size in enumerate(wanted):
        if size == 1:
            logits = _collapsed(logits, axis, arm.name)
    if not arm.learned:
        _check_uniform(logits)
        return {}
    rows = logits.expand(*wanted, -1).flatten(0, 2).clone()
    if not arm.low_rank:
        return {"logits": rows}
    router = target.router
    assert isinstance(router, LowRankRouter)
    zeros = torch.zeros(router.loadings.shape, dtype=rows.dtype)
    return {"base": rows, "loadings": zeros, "contrasts": cosines(len(router.contrasts), cfg.text_layers).to(rows)}


def _collapsed(logits: Float[Tensor, "D S H L"], axis: int, arm: str) -> Float[Tensor, "d s h L"]:
    """Keep the first entry of an axis along which all weights are equal; raise ValueError if they are not."""
    weights = logits.double().softmax(-1)
    apart = (weights - weights.narrow(axis, 0, 1)).abs().max().item()
    if apart > ALIKE:
        raise ValueError(
            f"this model is not a case of arm {arm!r}: the weights of {AXES[axis]} differ by up to {apart:.3g}; "
            "keep its arm, or choose a finer one"
        )
    return logits.narrow(axis, 0, 1)


def _check_uniform(logits: Float[Tensor, "1 1 1 L"]) -> None:
    apart = (logits.double().softmax(-1) - 1 / logits.shape[-1]).abs().max().item()
    if apart > ALIKE:
        raise ValueError(f"this model is not a case of arm 'uniform': its weights differ from it by up to {apart:.3g}")
