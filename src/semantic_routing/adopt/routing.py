"""The trainable part of an adopted model: which hidden states each block reads, how strongly, and whether it is on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from semantic_routing.adopt.facts import Facts
from semantic_routing.adopt.file import save_routing
from semantic_routing.adopt.prompts import versions
from semantic_routing.adopt.weights import REINJECT, make_weights
from semantic_routing.model.override import Edit, EditedRouter

Injection = Literal["swap", "reinject"]
INJECTIONS: tuple[Injection, ...] = get_args(Injection)
REINJECTED = 0.025
"""Part of the text that the arm ``reinject`` adds to the text of every block but the first, at a scale of 1."""
ATTRIBUTE = "semantic_routing"
"""Name of the attribute under which the transformer holds its routing."""


class Routing(nn.Module):
    """Routing on a pretrained transformer, made by ``adopt`` or ``load_routing``.

    ``parameters()`` are what to train; they stay in float32 whatever the dtype of the transformer. In training mode, in
    which ``adopt`` returns it, the text encoder records all layers; in evaluation mode only those with a weight other
    than 0.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.router = make_weights(facts.arm, facts.weights, facts.layers, facts.rows, facts.width)
        if facts.arm == REINJECT:
            gain = torch.full((facts.blocks,), REINJECTED)
            gain[0] = 0  # its stream is the text itself
            self.register_buffer("gain", gain)
        else:
            self.gain = nn.Parameter(torch.zeros(facts.blocks)) if facts.injection == REINJECT else None
        self._scale, self._enabled = 1.0, True
        self._active: tuple[Any, Tensor, list[int]] | None = None
        self._undo: Callable[[], None] | None = None

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 S"]:
        """Return each row's weights of the S = 1 + L states, [B or 1, D or 1, S]; state 0 is the original one.

        A row belongs to a block, to one of a block's slots in families that have several, or to all blocks. ``t`` (0
        noise, 1 data) is needed by arms that depend on time. The scale is not applied.
        """
        with at_hand(self.router):
            return self.router.weights(t)

    @property
    def depends_on_time(self) -> bool:
        """Whether the weights depend on the time."""
        return self.router.depends_on_time

    @property
    def scale(self) -> float:
        """Strength of the routing: 0 is the original model, 1 what was trained."""
        return self._scale

    @scale.setter
    def scale(self, scale: int | float) -> None:
        self._scale = float(scale)

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Change the weights of all rows by a function of them while the context lasts; see ``EditedRouter``."""
        own = self.router
        self.router = EditedRouter(own, (self.facts.rows, 1 + self.facts.layers), edit)
        try:
            yield
        finally:
            self.router = own

    def enable(self) -> None:
        """Turn the routing on again."""
        self._enabled = True

    def disable(self) -> None:
        """Turn the routing off: the model is the original one, and the text encoder records no layers."""
        self._enabled = False

    def remove(self) -> None:
        """Remove the routing from the model, which is then as it was before ``adopt``."""
        if self._undo is not None:
            undo, self._undo = self._undo, None
            undo()

    def save(self, folder: str | Path) -> Path:
        """Write ``routing.safetensors`` and a model card into a folder, beside its files; return the file's path."""
        with at_hand(self):
            return save_routing(self.facts, self.state_dict(), Path(folder))

    def trains(self) -> bool:
        """Return whether the gradient of this forward pass must reach the routing."""
        return self._enabled and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def change(self, t: Tensor | None) -> tuple[Float[Tensor, "B_or_1 R S"], list[int]]:
        """Return α - δ for each row, times the scale, and the blocks whose text differs from the original one.

        During training these are all blocks, because the gradient must reach all of them.
        """
        key = None if self.depends_on_time or self.trains() else self.key()
        if self._active is not None and key is not None and self._active[0] == key:
            return self._active[1], self._active[2]
        change = self._change(t)
        blocks = list(range(self.facts.blocks))
        if not self.trains():
            blocks = [block for block, moves in enumerate(self._moves(change).tolist()) if moves]
        self._active = (key, change, blocks)
        return change, blocks

    def _change(self, t: Tensor | None) -> Tensor:
        weights = self.weights(t if self.depends_on_time else None)
        original = torch.zeros_like(weights)
        original[..., 0] = 1
        scale = self._scale if self._enabled else 0.0
        return (scale * (weights - original)).expand(-1, self.facts.rows, -1)

    def _moves(self, change: Tensor) -> Tensor:
        """Return whether each block's text differs from the original's."""
        if self.gain is None:
            return (change != 0).any(-1).any(0).unflatten(0, (self.facts.blocks, -1)).any(-1)
        with at_hand(self):
            return self.gain * (self._scale if self._enabled else 0.0) != 0

    def strength(self, block: int) -> Tensor | None:
        """Return the part of a block's text that is added to its stream; None if texts are swapped."""
        if self.gain is None:
            return None
        with at_hand(self):
            return self._scale * self.gain[block]

    def key(self) -> tuple[Any, ...]:
        """Return the values that texts depend on besides the prompt and the time."""
        tensors = [*self.parameters(), *self.buffers()]
        return self.router, self._scale, self._enabled, tuple(map(id, tensors)), versions(tensors)

    def wanted(self) -> tuple[int, ...]:
        """Return the layers, from 1 to L, that the text encoder must record."""
        every = tuple(range(1, self.facts.layers + 1))
        if not self._enabled or self.facts.arm == REINJECT:
            return ()
        if self.training or self.depends_on_time or self.facts.slots > 1:
            return every
        with torch.no_grad():
            used = (self.weights()[..., 1:] != 0).flatten(0, -2).any(0).tolist()
        return tuple(layer for layer, weighs in zip(every, used, strict=True) if weighs)

    def _apply(self, fn: Any, recurse: bool = True) -> Routing:
        """Move the parameters with the transformer but keep their dtype."""
        return super()._apply(lambda x: x.to(device=fn(x).device), recurse)

    def extra_repr(self) -> str:
        return f"{self.facts.family}, arm={self.facts.arm}, weights={self.facts.weights}, scale={self._scale:g}"


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Load parameters that accelerate has offloaded module by module, within the context."""
    with ExitStack() as stack:
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)
            if hook is not None and any(p.is_meta for p in part.parameters(recurse=False)):
                hook.pre_forward(part)
                stack.callback(hook.post_forward, part, None)
        yield
