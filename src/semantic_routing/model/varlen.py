"""Variable-length attention. Imported lazily, because it imports torch's compiler."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from semantic_routing.model.packing import Packing

GQA: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""Asks torch 2.13 and later to share key heads among query heads; earlier versions always do."""


def varlen_attention(
    q: Float[Tensor, "B H S hd"], k: Float[Tensor, "1 Hkv T hd"], v: Float[Tensor, "1 Hkv T hd"], packing: Packing
) -> Float[Tensor, "B H S hd"]:
    """Attend from each sample's queries to its own prompt; H/Hkv query heads share each key head."""
    B, _, S, _ = q.shape
    cu_queries = torch.arange(0, (B + 1) * S, S, dtype=torch.int32, device=q.device)
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(queries, keys, values, cu_queries, packing.cu_seqlens, S, packing.max_seqlen, **GQA)
    return cast(Tensor, out).unflatten(0, (B, S)).transpose(1, 2)
