"""Counts the FLOPs of matrix products by running the networks on the meta device, which computes only shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from semantic_routing.model.context import TextContext
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.text.features import TextFeatures

META = torch.device("meta")
WEIGHT_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)
"""Products with a weight matrix, the last with one for each part of a block's text (``parts.py``); all others
(attention, the mix of layers) are batched."""


@dataclass(frozen=True)
class Products:
    """FLOPs of matrix products; a multiplication and an addition are two."""

    weights: int
    """FLOPs of products with a weight matrix."""
    batched: int
    """FLOPs of all other products."""

    @property
    def total(self) -> int:
        return self.weights + self.batched

    def __add__(self, other: Products) -> Products:
        return Products(self.weights + other.weights, self.batched + other.batched)

    def __mul__(self, times: int) -> Products:
        return Products(self.weights * times, self.batched * times)


def count(run: Callable[[], Any]) -> tuple[Products, Any]:
    """Run ``run``; return its FLOPs and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    counts = counter.get_flop_counts().get("Global", {})  # absent if nothing was multiplied
    weights = sum(count for op, count in counts.items() if op in WEIGHT_PRODUCTS)
    return Products(weights, counter.get_total_flops() - weights), result


def count_text(model: Backbone, batch: int, tokens: int) -> tuple[Products, TextContext]:
    """Count the preparation of ``batch`` prompts by a model on the meta device; return its context, too."""
    features = blank_features(model.cfg, batch, tokens, META)
    return count(lambda: model.prepare_text(features, torch.empty(batch, device=META)))


def count_image(model: Backbone, batch: int, height: int, width: int, context: TextContext) -> Products:
    """Count one forward pass over ``batch`` latents of this size, by a model on the meta device."""
    with META:
        x, t = torch.empty(batch, model.cfg.channels, height, width), torch.empty(batch)
    return count(lambda: model(x, t, context))[0]


def blank_features(cfg: DiTConfig, batch: int, tokens: int, device: torch.device) -> TextFeatures:
    """Return random features of the sizes the transformer reads, without padding."""
    with device:
        hidden = torch.randn(cfg.text_layers, batch, tokens, cfg.text_width)
        keys = torch.randn(cfg.text_layers, batch, cfg.kv_heads, tokens, cfg.head_dim)
        return TextFeatures(hidden, torch.ones(batch, tokens, dtype=torch.bool), keys, keys)


def qwen3_vl(
    *, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp_width: int, vocabulary: int = 1
) -> Any:
    """Return the language model of a Qwen3-VL of these sizes on the meta device."""
    from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

    config = Qwen3VLTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )
    with META:
        return Qwen3VLTextModel(config)


def count_language_model(model: Any, batch: int, tokens: int) -> Products:
    """Count one forward pass over ``batch`` prompts of a language model on the meta device, without its head."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)
    return count(lambda: model(input_ids=ids))[0]
