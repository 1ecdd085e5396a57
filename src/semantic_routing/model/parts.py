"""Keys and values of texts through one composed product: each mix is projected only to the channels that read it.

Between a mix m and its block's keys and values are a norm, the text projection P x + b that all blocks share, and the
block's own matrix W of 2 Hkv hd rows: W (P n + b) with n = RMSNorm(m). If a block has one mix, P n + b costs C^2 per
token. With R mixes that would be R C^2, and W would compute R times the keys and values that are read. Instead, A = W P
is composed once for a batch of prompts, at 2 Hkv hd C^2 per block, and each mix is multiplied by its own rows of A.
This costs 2 Hkv hd C per token for all mixes of a block together, less than the usual way with a single mix. For wide
texts it is cheaper with a single mix, too (``DiTConfig.composed``). The computation does not depend on the number of
prompts, so a prompt's keys and values do not either.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SCALE = 2.0**10
"""Size of the basis vectors: large, so that adding a bias to their images loses little to rounding in 16 bits."""


def basis(like: Float[Tensor, "*rows C"]) -> Float[Tensor, "C_plus_1 C"]:
    """Return ``SCALE`` times each unit vector, and zero: the inputs whose outputs determine an affine map.

    The map is taken from its outputs instead of its weights, so that adapters and sharding, which wrap a layer's call,
    are included.
    """
    width = like.shape[-1]
    return SCALE * torch.eye(width + 1, width, dtype=like.dtype, device=like.device)


def read_parts(
    parts: Float[Tensor, "P B N C"], images: Float[Tensor, "C_plus_1 K"], split: tuple[int, int], head_dim: int
) -> tuple[Float[Tensor, "B Hkv N hd"], Float[Tensor, "B Hkv N hd"]]:
    """Apply the affine map from text to keys and values, given by its ``images`` of ``basis``, part by part.

    ``split`` (sides, heads) says which of the 2 x Hkv x hd channels read a part: those of keys, of values or of both,
    and those of one head or of all. P = sides * heads, and heads change fastest.
    """
    sides, heads = split
    batch, length = parts.shape[1:3]
    own = images.unflatten(1, (2, -1, head_dim)).unflatten(2, (heads, -1)).unflatten(1, (sides, -1))
    own = own.permute(1, 3, 0, 2, 4, 5).flatten(0, 1).flatten(2)  # P C+1 (sides heads channels of a part)
    offset = own[:, -1:]
    out = torch.baddbmm(offset, parts.flatten(1, 2), (own[:, :-1] - offset) / SCALE)
    out = out.reshape(sides, heads, batch, length, 2 // sides, -1, head_dim)
    keys, values = out.permute(0, 4, 2, 1, 5, 3, 6).flatten(3, 4).flatten(0, 1)  # side, B, head, N, channel
    return keys, values
