"""Prompts as the transformer receives them: original states and layers, separated once per prompt."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

KEPT_PROMPTS = 4
"""Prompts whose texts are kept: two of guidance, for two calls in turn."""


@dataclass
class Prompt:
    """The text of one call of the transformer."""

    original: Any
    """What the transformer would have received: a tensor [B, N, C], or a list of [n, C]."""
    states: Tensor
    """States [T, B, N, C]: the original ones, then the layers ``kept``."""
    origins: list[int]
    """Index of each row's original state."""
    kept: tuple[int, ...]
    """Layers that are present, 1 to L."""
    neutral: Tensor | None
    """Tokens [B, N] that keep the original state: padding, and text of another encoder."""
    lengths: list[int]
    """Tokens of each sample."""
    texts: dict[Any, Any] = field(default_factory=dict)
    """What the blocks read, by everything that it depends on."""


class Layout:
    """Position of states and layers in the channels of a text: for each slot the original state, then its layers."""

    def __init__(self, slots: int, width: int, layers: int, rows: int) -> None:
        self.slots, self.width, self.layers, self.rows = slots, width, layers, rows

    def layers_behind(self, text: Any, held: tuple[int, ...]) -> tuple[int, ...] | None:
        """Return the layers that a text's channels hold: all, those ``held`` last, or none; None for another width."""
        channels = (text[0] if isinstance(text, list | tuple) else text).shape[-1]
        size, rest = divmod(channels, self.slots * self.width)
        every = tuple(range(1, self.layers + 1))
        for layers in ((), every, held):
            if not rest and size == 1 + -(-len(layers) // self.slots):
                return layers
        return None

    def unpacked(self, text: Any, kept: tuple[int, ...]) -> Prompt:
        """Take a text apart."""
        listed = isinstance(text, list | tuple)
        lengths = [len(sample) for sample in text] if listed else [text.shape[1]] * len(text)
        wide = pad_sequence(list(text), batch_first=True) if listed else text
        parts = wide.unflatten(-1, (self.slots, -1, self.width))  # B N slots 1+size C
        own = parts[..., 0, :]
        held = parts[..., 1:, :].flatten(2, 3)[:, :, : len(kept)]
        states = torch.cat([own, held], 2).permute(2, 0, 1, 3).contiguous()
        flat = own.flatten(2)
        original = [flat[i, :n].contiguous() for i, n in enumerate(lengths)] if listed else flat.contiguous()
        origins = [row % self.slots for row in range(self.rows)]
        neutral = (states[self.slots] == 0).all(-1) if kept else None  # no state of a layer is 0 in all channels
        return Prompt(original, states, origins, kept, neutral, lengths)


class Prompts:
    """Cache of the last prompts, found by the identity of the tensors that a pipeline passes at every step."""

    def __init__(self) -> None:
        self._found: list[tuple[list[Any], Any, Prompt]] = []

    def get(self, text: Any, key: Any) -> Prompt | None:
        """Return the prompt of a text, if the text has not changed since it was stored under an equal key."""
        tensors = _tensors(text)
        for references, known, prompt in self._found:
            same = len(references) == len(tensors) and all(r() is x for r, x in zip(references, tensors, strict=True))
            if same and known == (key, versions(tensors)):
                return prompt
        return None

    def put(self, text: Any, key: Any, prompt: Prompt) -> None:
        """Store a prompt until its tensors are gone or newer prompts replace it."""
        tensors = _tensors(text)
        references = [weakref.ref(x, self._drop) for x in tensors]
        self._found = [*self._found[1 - KEPT_PROMPTS :], (references, (key, versions(tensors)), prompt)]

    def clear(self) -> None:
        """Remove all prompts."""
        self._found = []

    def _drop(self, gone: Any) -> None:
        self._found = [entry for entry in self._found if all(r is not gone for r in entry[0])]


def versions(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Return torch's version counters, which change when a tensor is changed in place; inference tensors have none."""
    return tuple(-1 if x.is_inference() else x._version for x in tensors)


def _tensors(text: Any) -> list[Tensor]:
    return list(text) if isinstance(text, list | tuple) else [text]
