"""Text features: the form in which every part of the program passes on text.

Shape letters used everywhere: L language-model layers, B batch, N text tokens, C text width,
D transformer blocks, H heads, S image tokens, T times: one for each sample, or one for all (1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TextFeatures:
    """The hidden states of a frozen language model for a batch of prompts, from ``TextEncoder.encode``.

    Layer ``l`` (1..L) is the output of decoder layer ``l``; the embedding output is left out, and the last layer is
    taken after the final norm. Deep fusion (FuseDiT) reads the attention keys and values of the layers instead; they
    are present only if the encoder was asked for them.
    """

    hidden: Float[Tensor, "L B_or_1 N_or_T C"]
    """Hidden states of the L layers, [L, B, N, C] unless the prompts are packed."""
    mask: Bool[Tensor, "B N"]
    """True where a position holds a token of the prompt, False on padding."""
    keys: Float[Tensor, "L B Hkv N hd"] | None = None
    """Attention keys of each layer, after its own normalisation and rotary embedding."""
    values: Float[Tensor, "L B Hkv N hd"] | None = None
    """Attention values of each layer."""
    positions: Int[Tensor, " T"] | None = None
    """Only for packed prompts, whose states are [L, 1, T, C] without padding: each token's index in the flattened mask.
    States that only fill up T have the index B N."""

    def __post_init__(self) -> None:
        if self.positions is None and self.hidden.shape[1:3] != self.mask.shape:
            raise ValueError(
                f"hidden states {tuple(self.hidden.shape)} and mask {tuple(self.mask.shape)} do not agree on "
                "batch and length; expected hidden [L, B, N, C] and mask [B, N]"
            )

    def __getitem__(self, prompts: slice) -> TextFeatures:
        """Return the features of some of the prompts."""
        if self.positions is not None:
            raise ValueError("packed features cannot be sliced; encode the prompts without packing")
        keys, values = (None if x is None else x[:, prompts] for x in (self.keys, self.values))
        return TextFeatures(self.hidden[:, prompts], self.mask[prompts], keys, values)

    def repeat(self, times: int) -> TextFeatures:
        """Return the features of all prompts, ``times`` times one after another."""
        if self.positions is not None:
            raise ValueError("packed features cannot be repeated; encode the prompts without packing")

        def again(x: Tensor, dim: int) -> Tensor:
            return torch.cat([x] * times, dim)

        keys, values = (None if x is None else again(x, 1) for x in (self.keys, self.values))
        return TextFeatures(again(self.hidden, 1), again(self.mask, 0), keys, values)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextFeatures:
        """Return the features on another device or in another dtype."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=dtype)

        hidden = self.hidden.to(device=device, dtype=dtype)
        positions = None if self.positions is None else self.positions.to(device=device)
        return TextFeatures(hidden, self.mask.to(device=device), move(self.keys), move(self.values), positions)
