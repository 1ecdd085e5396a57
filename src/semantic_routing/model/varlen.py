"""Attention to prompts that lie one behind the other. A file of its own, for it loads torch's compiler."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from semantic_routing.model.ragged import Ragged

GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch before 2.13 shares key heads among query heads without being asked."""


def ragged_attention(
    q: Float[Tensor, "B H S hd"], k: Float[Tensor, "1 Hkv T hd"], v: Float[Tensor, "1 Hkv T hd"], ragged: Ragged
) -> Float[Tensor, "B H S hd"]:
    """Softmax attention of each sample's queries to its own prompt; H/Hkv query heads share each key head."""
    B, _, S, _ = q.shape
    starts = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=q.device)
    rows, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = cast(Tensor, varlen_attn(rows, keys, values, starts, ragged.ends, S, ragged.longest, **GROUPED))
    return out.unflatten(0, (B, S)).transpose(1, 2)
