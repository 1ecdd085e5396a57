"""Matrix products counted, not estimated: the real networks run on the meta device, which knows shapes alone."""

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
WEIGHT_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
"""Products with a weight matrix; all others (attention's, the mixing of layers) are batched."""


@dataclass(frozen=True)
class Products:
    """Floating-point operations of matrix products, two for each multiplication and addition."""

    weights: int
    """Products with a weight matrix."""
    batched: int
    """All others."""

    @property
    def total(self) -> int:
        return self.weights + self.batched

    def __add__(self, other: Products) -> Products:
        return Products(self.weights + other.weights, self.batched + other.batched)

    def __mul__(self, times: int) -> Products:
        return Products(self.weights * times, self.batched * times)


def count(run: Callable[[], Any]) -> tuple[Products, Any]:
    """The products of a computation, and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        result = run()
    counts = counter.get_flop_counts().get("Global", {})  # absent where nothing was multiplied
    weights = sum(count for op, count in counts.items() if op in WEIGHT_PRODUCTS)
    return Products(weights, counter.get_total_flops() - weights), result


def count_text(model: Backbone, batch: int, tokens: int) -> tuple[Products, TextContext]:
    """Preparing ``batch`` prompts once, by a model on the meta device."""
    features = blank_features(model.cfg, batch, tokens, META)
    return count(lambda: model.prepare_text(features, torch.empty(batch, device=META)))


def count_image(model: Backbone, batch: int, height: int, width: int, context: TextContext) -> Products:
    """One velocity of ``batch`` latents of that size, by a model on the meta device."""
    with META:
        x, t = torch.empty(batch, model.cfg.channels, height, width), torch.empty(batch)
    return count(lambda: model(x, t, context))[0]


def blank_features(cfg: DiTConfig, batch: int, tokens: int, device: torch.device) -> TextFeatures:
    """Random features of prompts without padding, as the transformer expects them."""
    with device:
        hidden = torch.randn(cfg.text_layers, batch, tokens, cfg.text_width)
        keys = torch.randn(cfg.text_layers, batch, cfg.kv_heads, tokens, cfg.head_dim)
        return TextFeatures(hidden, torch.ones(batch, tokens, dtype=torch.bool), keys, keys)


def qwen3_vl(
    *, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, mlp_width: int, vocabulary: int = 1
) -> Any:
    """The text half of a Qwen3-VL model of these sizes on the meta device."""
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
    """One pass of a language model on the meta device over ``batch`` prompts, its head left out."""
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=META)
    return count(lambda: model(input_ids=ids))[0]
