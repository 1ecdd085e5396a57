"""TextContext: the keys and values that every block reads, and joining two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from semantic_routing.model.layers import BlockText
from semantic_routing.model.packing import Packing


@dataclass(frozen=True)
class TextContext:
    """Keys and values of the text for every block's attention, made by ``prepare_text`` and used at every step."""

    keys: tuple[Float[Tensor, "B Hkv N hd"], ...]
    """Keys of block d at index d."""
    values: tuple[Float[Tensor, "B Hkv N hd"], ...]
    """Values of block d at index d."""
    mask: Bool[Tensor, "B N"] | None
    """True on tokens to attend to; None if no position is padding."""
    packing: Packing | None = None
    """Lengths of the prompts if they are packed, with B = 1."""

    def blocks(self) -> list[BlockText]:
        """Return keys, values and mask of each block."""
        return [BlockText(k, v, self.mask, self.packing) for k, v in zip(self.keys, self.values, strict=True)]

    def packed(self) -> TextContext:
        """Return this context, which has no mask, with its prompts packed."""
        if self.packing is not None:
            return self
        B, _, N, _ = self.keys[0].shape
        lengths = torch.full((B,), N, device=self.keys[0].device)
        keys, values = (tuple(x.transpose(0, 1).flatten(1, 2)[None] for x in xs) for xs in (self.keys, self.values))
        return packed_context(keys, values, Packing.of(lengths, N))


def packed_context(keys: tuple[Tensor, ...], values: tuple[Tensor, ...], packing: Packing) -> TextContext:
    """Return the context of packed prompts, marked so that compiled blocks serve any number of tokens."""
    for x in (*keys, *values):
        # Private: torch.compiler (2.13) has no public call, and loading it would be slow for those who do not compile.
        torch._dynamo.maybe_mark_dynamic(x, 2)
    return TextContext(keys, values, None, packing)


def join_contexts(prompt: TextContext, null: TextContext) -> TextContext:
    """Concatenate the contexts of prompts and of their null prompts into one batch.

    Both are padded to the longer one, or packed if one of them has no mask. A single null prompt serves all prompts.
    """
    if prompt.mask is None or null.mask is None:
        return _join_packed(prompt.packed(), null.packed())
    batch, _, length, _ = prompt.keys[0].shape
    longest = max(length, null.keys[0].shape[2])
    keys, values = (
        tuple(concat_padded(a, b, batch, longest, rows=0, tokens=2) for a, b in zip(*pair, strict=True))
        for pair in ((prompt.keys, null.keys), (prompt.values, null.values))
    )
    return TextContext(keys, values, concat_padded(prompt.mask, null.mask, batch, longest, rows=0, tokens=1))


def _join_packed(prompt: TextContext, null: TextContext) -> TextContext:
    """Concatenate packed contexts; repeat the null prompt if there is one for all prompts."""
    assert prompt.packing is not None
    assert null.packing is not None
    cu_prompt, cu_null = prompt.packing.cu_seqlens, null.packing.cu_seqlens
    repeats = (len(cu_prompt) - 1) // (len(cu_null) - 1)
    lengths = torch.cat([cu_prompt.diff(), cu_null.diff().repeat(repeats)])
    keys, values = (
        tuple(torch.cat([a, *[b] * repeats], dim=2) for a, b in zip(*pair, strict=True))
        for pair in ((prompt.keys, null.keys), (prompt.values, null.values))
    )
    return packed_context(keys, values, Packing.of(lengths, max(prompt.packing.max_seqlen, null.packing.max_seqlen)))


def concat_padded(a: Tensor, b: Tensor, batch: int, longest: int, *, rows: int, tokens: int) -> Tensor:
    """Concatenate ``a`` and ``b`` along ``rows``, with ``tokens`` padded to ``longest``.

    ``b`` is expanded to ``batch`` rows if it has one.
    """
    a, b = (F.pad(x, [*[0, 0] * (x.ndim - 1 - tokens), 0, longest - x.shape[tokens]]) for x in (a, b))
    sizes = [-1] * b.ndim
    sizes[rows] = batch
    return torch.cat([a, b.expand(sizes)], dim=rows)
