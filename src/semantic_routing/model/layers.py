"""The parts of a transformer block: normalisation, rotary positions, attention, gated MLP, time embedding."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from semantic_routing.model.packing import Packing
from semantic_routing.model.parts import read_parts

ACTIVATIONS = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of rotary positions, each [S, hd/2]."""


class BlockText(NamedTuple):
    """Keys and values of the text for one block's attention."""

    keys: Float[Tensor, "B Hkv N hd"]
    values: Float[Tensor, "B Hkv N hd"]
    mask: Bool[Tensor, "B N"] | None
    packing: Packing | None = None
    """Lengths of the prompts if they are packed, with B = 1."""


def zero_(layer: nn.Linear) -> nn.Linear:
    """Set the layer's weights and biases to zero and return it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def linear(width: int, *parts: int, bias: bool = False) -> nn.Linear:
    """Return one layer for several maps of the same input, each initialised Xavier-uniform; biases are zero."""
    layer = nn.Linear(width, sum(parts), bias=bias)
    for part in layer.weight.split(parts):
        nn.init.xavier_uniform_(part)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32 (Zhang & Sennrich, 2019)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)


def rope_2d(height: int, width: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    """Return cosines and sines of 2-D rotary positions for ``height`` x ``width`` tokens, each [S, hd/2].

    The first half of the rotated pairs encodes the row, the second the column (Heo et al., 2024). The result is cached.
    """
    return _rope_tables(height, width, head_dim, theta, device)


# The graph is compiled for one grid, so the tables are its constants. This is the flag that torch.compiler's
# assume_constant_result sets (torch 2.13); calling it would import the compiler for those who do not compile.
rope_2d._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table first made while sampling must also serve training
def _rope_tables(height: int, width: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    if head_dim % 4:
        raise ValueError(f"head_dim {head_dim} must be a multiple of 4: rows and columns rotate pairs of channels")
    quarter = head_dim // 4
    freqs = theta ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * freqs
    cols = torch.arange(width, dtype=torch.float32, device=device)[:, None] * freqs
    angles = torch.cat([rows[:, None].expand(-1, width, -1), cols[None].expand(height, -1, -1)], dim=-1).reshape(
        height * width, 2 * quarter
    )
    return angles.cos(), angles.sin()


def apply_rope(x: Float[Tensor, "B S H hd"], rope: Rope) -> Float[Tensor, "B S H hd"]:
    """Rotate the channel pairs (i, i + hd/2) of every token by its position's angles."""
    cos, sin = (table[:, None] for table in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attention(
    q: Float[Tensor, "B H S hd"],
    k: Float[Tensor, "B Hkv N hd"],
    v: Float[Tensor, "B Hkv N hd"],
    mask: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, "B H S hd"]:
    """Apply softmax attention in which H/Hkv query heads share each key head; ``mask`` is True on keys to attend to.

    For training on a CPU the products are written out, because the backward pass of torch's fused kernel is several
    times slower at these sizes. Grouped heads become rows, so that keys and values are not repeated.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        m = None if mask is None else mask[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=m, enable_gqa=q.shape[1] != k.shape[1])
    B, H, S, hd = q.shape
    groups = k.shape[1]
    rows = q.reshape(B, groups, H // groups * S, hd)
    logits = (rows @ k.transpose(-1, -2)).float() / math.sqrt(hd)
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
    return (logits.softmax(-1).to(v.dtype) @ v).reshape(B, H, S, hd)


class SelfAttention(nn.Module):
    """Grouped-query attention among image tokens with QK-norm and 2-D RoPE.

    With ``text``, its keys and values are put before the image's own (deep fusion).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.head_dim = head_dim
        self.qkv = linear(width, *self.sizes)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.out = linear(heads * head_dim, width)

    def forward(
        self,
        x: Float[Tensor, "B S W"],
        rope: Rope,
        text: BlockText | None = None,
    ) -> Float[Tensor, "B S W"]:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).split(self.sizes, dim=-1))
        q = apply_rope(self.q_norm(q), rope).to(v.dtype).transpose(1, 2)
        k = apply_rope(self.k_norm(k), rope).to(v.dtype).transpose(1, 2)
        v = v.transpose(1, 2)
        mask = None
        if text is not None:
            k = torch.cat([text.keys.to(k.dtype), k], dim=2)
            v = torch.cat([text.values.to(v.dtype), v], dim=2)
            mask = None if text.mask is None else F.pad(text.mask, (0, x.shape[1]), value=True)
        return self.out(attention(q, k, v, mask).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Grouped-query attention from image tokens to the block's text, with QK-norm and without positions.

    ``prepare`` computes keys and values, which depend only on the text; ``forward`` reads them. ``prepare_parts``
    computes them from several texts, each for its own heads, or for keys or values alone.
    """

    def __init__(self, width: int, text_width: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = linear(width, heads * head_dim)
        self.kv = linear(text_width, kv_heads * head_dim, kv_heads * head_dim)
        self.q_norm = RMSNorm(head_dim)
        self.k_norm = RMSNorm(head_dim)
        self.out = linear(heads * head_dim, width)

    def prepare(self, text: Float[Tensor, "B N C"]) -> tuple[Tensor, Tensor]:
        """Return keys and values of the text, each [B, Hkv, N, hd]."""
        k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.kv(text).chunk(2, dim=-1))
        return self.k_norm(k).transpose(1, 2), v.transpose(1, 2)

    def prepare_parts(
        self, parts: Float[Tensor, "P B N C"], probed: Float[Tensor, "C_plus_1 C"], split: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [B, Hkv, N, hd], from P normalised mixes, each read by its own channels.

        ``probed`` is the text projection of ``basis``; ``split`` is that of the arm (``parts.py``).
        """
        k, v = read_parts(parts, self.kv(probed), split, self.head_dim)
        return self.k_norm(k), v

    def forward(self, x: Float[Tensor, "B S W"], text: BlockText) -> Float[Tensor, "B S W"]:
        k, v, mask, packing = text
        q = self.q_norm(self.q(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2).to(k.dtype)
        if packing is None:
            out = attention(q, k, v, mask)
        else:
            from semantic_routing.model.varlen import varlen_attention

            out = varlen_attention(q, k, v, packing)
        return self.out(out.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Gated MLP: down(act(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.gate_up = linear(width, hidden, hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B S W"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


def sinusoidal(t: Float[Tensor, " B"], width: int) -> Float[Tensor, "B width"]:
    """Return [cos | sin] of t at frequencies 10000^(-2i/width), i = 0..width/2-1, in float32 (Eq. 12)."""
    half = width // 2
    freqs = 10000.0 ** (-torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Embedding of a time in [0, 1] in the backbone's width: 256 sinusoids of 1000 t and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(linear(256, width, bias=True), nn.SiLU(), linear(width, width, bias=True))

    def forward(self, t: Float[Tensor, " B"]) -> Float[Tensor, "B W"]:
        return self.mlp(sinusoidal(1000 * t, 256))
