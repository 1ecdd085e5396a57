"""Tiny networks with random weights, whose kind and sizes a test chooses in one line."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiTConfig

M = TypeVar("M", bound=nn.Module)
TINY = DiTConfig(
    depth=3, width=16, heads=2, kv_heads=1, head_dim=8, mlp_width=16, channels=3, text_width=8, text_layers=3,
    fusedit_first_layer=0,
)  # fmt: skip
"""Three blocks of width 16 that read three layers of width 8."""
DISTINCT: dict[str, Any] = {
    "width": 24, "heads": 4, "kv_heads": 2, "mlp_width": 40, "text_width": 20, "text_layers": 5,
    "fusedit_first_layer": 1,
}  # fmt: skip
"""Changes of ``TINY`` that give axes different sizes, for tests that must not confuse two of them."""


def tiny_config(arm: str = "depth", **changes: Any) -> DiTConfig:
    """Return ``TINY`` for an arm, with some of its sizes changed."""
    return DiTConfig(**{**vars(TINY), "arm": arm, **changes})


def tiny_network(arm: str = "depth", *, std: float = 0.1, seed: int = 0, **changes: Any) -> Backbone:
    """Return a frozen network of ``tiny_config(arm, **changes)`` that responds to picture, time and text.

    Weights that start at zero, such as the router's logits and the last layer, are drawn with deviation ``std``,
    because zeros would hide what reads them.
    """
    torch.manual_seed(seed)
    return move_zeros(make_model(tiny_config(arm, **changes)), std).requires_grad_(False)


def randomize(model: M) -> M:
    """Draw every weight of ``model`` again, so that no weight is 0 or 1, and return it."""
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p.data, std=p.shape[-1] ** -0.5)
        else:
            nn.init.normal_(p.data, mean=1.0, std=0.3)
    return model


def move_zeros(model: M, std: float = 0.1) -> M:
    """Draw the parameters of ``model`` that are all zero, with deviation ``std``, and return it."""
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p.data, std=std)
    return model


class CountingModel(nn.Module):
    """A network that records the batch size of every forward pass."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model, self.rows = model, list[int]()
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows.append(len(args[0]))

    @property
    def calls(self) -> int:
        """Number of forward passes."""
        return len(self.rows)
