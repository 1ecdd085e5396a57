"""Tiny networks with random weights, of a kind and size that one line of a test decides."""

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


def tiny_config(arm: str = "depth", **changes: Any) -> DiTConfig:
    """``TINY`` as a network of an arm, with some of its sizes changed."""
    return DiTConfig(**{**vars(TINY), "arm": arm, **changes})


def tiny_network(arm: str = "depth", *, std: float = 0.1, seed: int = 0, **changes: Any) -> Backbone:
    """A frozen network of ``tiny_config(arm, **changes)`` that answers to picture, time and text.

    Weights that start at zero, among them the router's logits and the last layer, would hide what reads them: they are
    drawn with deviation ``std``, as if they had been trained.
    """
    torch.manual_seed(seed)
    return move_zeros(make_model(tiny_config(arm, **changes)), std).requires_grad_(False)


def move_zeros(model: M, std: float = 0.1) -> M:
    """Draw the weights of ``model`` that are all zero, with deviation ``std``; returns it."""
    for p in model.parameters():
        if p.eq(0).all():
            nn.init.normal_(p.data, std=std)
    return model


class CountingModel(nn.Module):
    """A network that counts how often it is run, and on how many rows each time."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model, self.rows = model, list[int]()
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows.append(len(args[0]))

    @property
    def calls(self) -> int:
        """How often the network was run."""
        return len(self.rows)
