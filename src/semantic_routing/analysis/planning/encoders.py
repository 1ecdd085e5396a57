"""The sizes of the language models that recipes use, as far as a plan needs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from semantic_routing.analysis.overhead import SCALES
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.flops import count_language_model, qwen3_vl
from semantic_routing.text.architecture import model_config, stack_config
from semantic_routing.text.config import TextEncoderConfig, resolve_layers, tiny_sizes
from semantic_routing.text.source import find_source
from semantic_routing.training.tiny_lm import VOCABULARY


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """The sizes of a language model whose layers are like those of Qwen3; others are counted as if they were."""

    width: int
    """Width of a hidden state."""
    read: int
    """Layers that the transformer reads."""
    layers: int
    """Layers that run: up to the last one that is read."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Channels of a head."""
    mlp_width: int
    """Hidden channels of the gated MLP."""
    vocabulary: int
    """Tokens that have an embedding."""

    def count(self, tokens: int) -> tuple[int, int]:
        """Return the language model's weights, and the FLOPs of a prompt; its layers are equal, so one is counted."""
        one, two = self._network(1), self._network(2)
        few, more = (sum(p.numel() for p in model.parameters()) for model in (one, two))
        return few + (self.layers - 1) * (more - few), self.layers * count_language_model(one, 1, tokens).total

    def _network(self, layers: int) -> Any:
        return qwen3_vl(
            width=self.width,
            layers=layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            mlp_width=self.mlp_width,
            vocabulary=self.vocabulary,
        )

    def of(self, model: DiTConfig) -> DiTConfig:
        """Return a transformer's sizes with the text width and layers of this language model."""
        return replace(model, text_width=self.width, text_layers=self.read)


def encoder_sizes(text: TextEncoderConfig, model: DiTConfig) -> EncoderSizes:
    """Return the sizes of a run's language model; a configuration is read only for models that no recipe names.

    Raises ValueError if the configuration cannot be loaded, or has no attention or no gated MLP.
    """
    tiny, paper = tiny_sizes(text.name_or_path), SCALES["paper"]
    if tiny is not None:
        width, total = tiny.get("width", model.text_width), tiny.get("layers", model.text_layers)
        kinds = (width // 32, max(1, width // 64), 32, 3 * width, VOCABULARY)
    elif text.name_or_path == "Qwen/Qwen3-VL-4B-Instruct":
        width, total = paper.model.text_width, paper.model.text_layers
        kinds = (
            paper.encoder_heads,
            paper.encoder_kv_heads,
            paper.encoder_head_dim,
            paper.encoder_mlp_width,
            151_936,
        )
    else:
        stack = stack_config(model_config(text.name_or_path, find_source(text.name_or_path)))
        heads = getattr(stack, "num_attention_heads", 0) or 0
        inner = getattr(stack, "intermediate_size", 0) or 0
        if not heads or not isinstance(inner, int) or not inner:
            raise ValueError(
                f"the products of {text.name_or_path} cannot be counted: semroute plan knows attention with a gated "
                "MLP; give --text.name-or-path of such a language model of about the same size"
            )
        width, total = stack.hidden_size, stack.num_hidden_layers
        kv_heads = getattr(stack, "num_key_value_heads", None) or heads
        kinds = (heads, kv_heads, getattr(stack, "head_dim", None) or width // heads, inner, stack.vocab_size)
    chosen = resolve_layers(text.layers, total)
    names = ("heads", "kv_heads", "head_dim", "mlp_width", "vocabulary")
    return EncoderSizes(width=width, read=len(chosen), layers=chosen[-1], **dict(zip(names, kinds, strict=True)))
