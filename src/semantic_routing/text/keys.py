"""Attention keys and values of a language model's layers, which FuseDiT reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from semantic_routing.text.architecture import find_layers
from semantic_routing.text.config import TextShape


def check_keys(model: nn.Module, shape: TextShape, name: str) -> None:
    """Raise ValueError unless each layer of the model ``name`` has keys and values."""
    if not find_layers(model)[1]:
        raise ValueError(f"{name} is an encoder; keys and values need a decoder")
    if not shape.kv_heads:
        raise ValueError(f"{name} has no attention, whose keys and values fusedit reads")
    from transformers import DynamicCache

    own = DynamicCache(config=model.config).layers
    if any(hasattr(layer, "conv_states") for layer in own):  # LFM2, Jamba, Qwen3.5
        raise ValueError(f"{name} has layers without keys, which fusedit cannot read")


def read_keys(
    cache: Any, layers: Sequence[int], name: str
) -> tuple[Float[Tensor, "L B Hkv N hd"], Float[Tensor, "L B Hkv N hd"]]:
    """Return the keys and values of ``layers`` (from 1) in a cache of transformers that the model ``name`` filled.

    Raises ValueError unless all are there and of one shape.
    """
    held = [] if cache is None else cache.layers
    if len(held) < layers[-1]:
        raise ValueError(f"{name} does not keep keys and values for each layer, which fusedit reads")
    cached = [held[i - 1] for i in layers]
    keys: list[Any]
    values: list[Any]
    keys, values = ([getattr(c, side, None) for c in cached] for side in ("keys", "values"))
    if len({getattr(x, "shape", None) for x in (*keys, *values)}) > 1 or keys[0] is None:
        raise ValueError(f"the layers of {name} have keys of different shapes, which fusedit cannot read")
    return torch.stack(keys), torch.stack(values)
