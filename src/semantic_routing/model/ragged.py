"""Prompts of different lengths one behind the other, without padding: what a GPU's attention reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor


class Ragged(NamedTuple):
    """Where the prompts of a batch are among their tokens, which lie one behind the other."""

    ends: Int[Tensor, " B_plus_1"]
    """Prompt b has the tokens from ``ends[b]`` to ``ends[b + 1]``, in int32."""
    longest: int
    """No prompt has more tokens."""

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], longest: int) -> Ragged:
        """Prompts of these lengths."""
        return cls(F.pad(lengths.cumsum(0), (1, 0)).int(), longest)


def is_worthwhile(x: Tensor) -> bool:
    """Whether attention to a text like ``x`` can be ragged: on a GPU, in 16 bits, as autocast makes them, too."""
    if x.device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype.itemsize == 2


def without_padding(mask: Bool[Tensor, "B N"]) -> tuple[Ragged | None, Int[Tensor, " T"]]:
    """The prompts of a batch, and the places of their T tokens among its B x N; None where all places are tokens."""
    places = mask.flatten().nonzero()[:, 0]
    if len(places) == mask.numel():
        return None, places
    return Ragged.of(mask.sum(1), mask.shape[1]), places


class Layout(NamedTuple):
    """How the tokens of a batch of prompts lie in memory: padded behind a mask, or packed one behind the other."""

    mask: Bool[Tensor, "B N"] | None
    """True on tokens; None where no position is padding."""
    ragged: Ragged | None = None
    """Where the prompts are, if they are packed."""
    places: Int[Tensor, " T"] | None = None
    """Where the packed tokens are among the padded ones."""

    @classmethod
    def of(cls, hidden: Tensor, mask: Bool[Tensor, "B N"]) -> Layout:
        """Choose how to lay out prompts with these states: packed where attention can read that."""
        if not is_worthwhile(hidden):
            return cls(mask)
        ragged, places = without_padding(mask)
        return cls(None) if ragged is None else cls(None, ragged, places)

    def pack(self, x: Tensor) -> Tensor:
        """Leave padding out of ``x`` [..., B, N, C], which becomes [..., 1, T, C]; a padded layout keeps it."""
        return x if self.places is None else packed(x, self.places, x.ndim - 3)


def packed(x: Tensor, places: Int[Tensor, " T"], axis: int) -> Tensor:
    """``x`` with its axes B and N, from ``axis`` on, made 1 and T: its tokens at ``places``."""
    return x.flatten(axis, axis + 1).index_select(axis, places).unsqueeze(axis)
