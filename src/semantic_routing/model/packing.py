"""Packed (unpadded) batches of prompts: for variable-length attention on GPUs, and for training on a CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from semantic_routing.text.features import TextFeatures


class Packing(NamedTuple):
    """Lengths of prompts that are concatenated along one token axis."""

    cu_seqlens: Int[Tensor, " B_plus_1"]
    """Cumulative lengths in int32: prompt b has the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``."""
    max_seqlen: int
    """Upper bound of the prompts' lengths."""

    @classmethod
    def of(cls, lengths: Int[Tensor, " B"], max_seqlen: int) -> Packing:
        """Pack prompts of these lengths."""
        return cls(F.pad(lengths.cumsum(0), (1, 0)).int(), max_seqlen)


def can_pack(x: Tensor) -> bool:
    """Return whether variable-length attention supports ``x``: on a GPU, in 16 bits, before or after autocast."""
    if x.device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return dtype.itemsize == 2


class Layout(NamedTuple):
    """Memory layout of a batch of prompts: padded with a mask, or packed."""

    mask: Bool[Tensor, "B N"] | None
    """True on tokens; None if no position is padding."""
    packing: Packing | None = None
    """Lengths of the prompts if they are packed."""
    positions: Int[Tensor, " T"] | None = None
    """Positions of the packed tokens in the flattened padded batch."""
    arrived: Int[Tensor, " T"] | None = None
    """``TextFeatures.positions`` of prompts that arrived packed and are padded again for attention."""

    @classmethod
    def of(cls, features: TextFeatures) -> Layout:
        """Choose the layout for prompts: packed if attention supports it."""
        hidden, mask = features.hidden, features.mask
        if features.positions is not None:
            return cls(mask, arrived=features.positions)
        if not can_pack(hidden):
            return cls(mask)
        positions = mask.flatten().nonzero()[:, 0]
        if len(positions) == mask.numel():
            return cls(None)
        return cls(None, Packing.of(mask.sum(1), mask.shape[1]), positions)

    def pack(self, x: Tensor) -> Tensor:
        """Drop the padding of ``x`` [..., B, N, C], which becomes [..., 1, T, C]; a padded layout keeps it."""
        if self.positions is None:
            return x
        return x.flatten(-3, -2).index_select(-2, self.positions).unsqueeze(-3)

    def samples(self) -> Int[Tensor, " T"]:
        """Return the prompt of each token that arrived packed; filler tokens belong to the last prompt."""
        assert self.mask is not None
        assert self.arrived is not None
        B, N = self.mask.shape
        return (self.arrived // N).clamp(max=B - 1)

    def pad(self, x: Tensor) -> Tensor:
        """Pad keys or values [1, Hkv, T, hd] that arrived packed to [B, Hkv, N, hd]; others stay as they are."""
        if self.arrived is None:
            return x
        assert self.mask is not None
        B, N = self.mask.shape
        tokens = x[0].transpose(0, 1)
        out = tokens.new_zeros(B * N + 1, *tokens.shape[1:]).index_copy(0, self.arrived, tokens)
        return out[:-1].unflatten(0, (B, N)).transpose(1, 2)
