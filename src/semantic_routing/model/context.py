"""TextContext: the keys and values that every block reads, and joining two of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from semantic_routing.model.layers import BlockText
from semantic_routing.model.ragged import Ragged


@dataclass(frozen=True)
class TextContext:
    """What every block's attention reads of the text: made once by ``prepare_text``, read at every step."""

    keys: tuple[Float[Tensor, "B Hkv N hd"], ...]
    """Keys of block d at index d."""
    values: tuple[Float[Tensor, "B Hkv N hd"], ...]
    """Values of block d at index d."""
    mask: Bool[Tensor, "B N"] | None
    """True on tokens to attend to; None where no position is padding."""
    ragged: Ragged | None = None
    """Where the prompts are, if all of their tokens lie one behind the other, as those of one sample."""

    def blocks(self) -> list[BlockText]:
        """Keys, values and mask for each block in turn."""
        return [BlockText(k, v, self.mask, self.ragged) for k, v in zip(self.keys, self.values, strict=True)]

    def without_padding(self) -> TextContext:
        """The same, of a context without a mask, as prompts that lie one behind the other."""
        if self.ragged is not None:
            return self
        B, _, N, _ = self.keys[0].shape
        lengths = torch.full((B,), N, device=self.keys[0].device)
        keys, values = (tuple(x.transpose(0, 1).flatten(1, 2)[None] for x in xs) for xs in (self.keys, self.values))
        return ragged_context(keys, values, Ragged.of(lengths, N))


def ragged_context(keys: tuple[Tensor, ...], values: tuple[Tensor, ...], ragged: Ragged) -> TextContext:
    """The context of prompts that lie one behind the other, whose number of tokens makes no graph of its own."""
    for x in (*keys, *values):
        torch._dynamo.maybe_mark_dynamic(x, 2)
    return TextContext(keys, values, None, ragged)


def join_contexts(prompt: TextContext, null: TextContext) -> TextContext:
    """Keys and values of prompts and of their null prompts as one batch.

    Padded to the longer of the two, or one behind the other where the prompts are.
    """
    if prompt.mask is None or null.mask is None:
        return _one_behind_the_other(prompt, null)
    batch, _, length, _ = prompt.keys[0].shape
    longest = max(length, null.keys[0].shape[2])
    keys, values = (
        tuple(_both(a, b, batch, longest, rows=0, tokens=2) for a, b in zip(*pair, strict=True))
        for pair in ((prompt.keys, null.keys), (prompt.values, null.values))
    )
    return TextContext(keys, values, _both(prompt.mask, null.mask, batch, longest, rows=0, tokens=1))


def _one_behind_the_other(prompt: TextContext, null: TextContext) -> TextContext:
    """The contexts of both without padding; the null prompt's is repeated where there is one for all."""
    prompt, null = prompt.without_padding(), null.without_padding()
    assert prompt.ragged is not None
    assert null.ragged is not None
    ends, more = prompt.ragged.ends, null.ragged.ends
    times = (len(ends) - 1) // (len(more) - 1)
    lengths = torch.cat([ends.diff(), more.diff().repeat(times)])
    keys, values = (
        tuple(torch.cat([a, *[b] * times], dim=2) for a, b in zip(*pair, strict=True))
        for pair in ((prompt.keys, null.keys), (prompt.values, null.values))
    )
    return ragged_context(keys, values, Ragged.of(lengths, max(prompt.ragged.longest, null.ragged.longest)))


def _both(a: Tensor, b: Tensor, batch: int, longest: int, *, rows: int, tokens: int) -> Tensor:
    """``a`` and ``b``, which is repeated to ``batch`` where it is one, along the axis ``rows``; each with its axis
    ``tokens`` padded to ``longest``."""
    a, b = (F.pad(x, [*[0, 0] * (x.ndim - 1 - tokens), 0, longest - x.shape[tokens]]) for x in (a, b))
    sizes = [-1] * b.ndim
    sizes[rows] = batch
    return torch.cat([a, b.expand(sizes)], dim=rows)
