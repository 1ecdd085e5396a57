"""Configurations of language models: their text layers, the sizes of their features, and what is not supported."""

from __future__ import annotations

from typing import Any

from torch import nn

from semantic_routing.text.config import TextEncoderConfig, TextShape, resolve_layers
from semantic_routing.text.gguf import gguf_config
from semantic_routing.text.quiet import first_line
from semantic_routing.text.source import HUB_NAME, INSTALL, SMOLLM2, Source, find_source

UNFIT = {
    "convbert": "its hidden states depend on padding",
    "fnet": "its hidden states depend on padding",
    "gemma3n_text": "its layers have four hidden states each",
    "mobilebert": "its hidden states depend on padding",
    "nemotron_h": "its last hidden state is not always the model's output",
    "nystromformer": "its hidden states depend on padding",
    "yoso": "its hidden states depend on padding",
    "flaubert": "its layers are not separate modules",
    "xlm": "its layers are not separate modules",
}
"""Architectures that transformers loads but whose features would be wrong."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names that configurations have for their number of experts."""


def text_shape(config: TextEncoderConfig) -> TextShape:
    """Return the sizes of an encoder's features without loading its weights."""
    return shape_of(config, stack_config(model_config(config.name_or_path, find_source(config.name_or_path))))


def model_config(name: str, source: Source) -> Any:
    """Load a model's configuration; for a multimodal model that of all parts."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if source.file is not None:
        return gguf_config(source)
    try:
        return AutoConfig.from_pretrained(source.place, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        if name == SMOLLM2:
            raise ValueError(
                f"the text encoder smollm2 is not installed, and {HUB_NAME} cannot be loaded from the hub: {INSTALL}"
            ) from error
        raise ValueError(
            f"no text encoder at {name!r}; expected a folder written by save_pretrained, a GGUF file or a model's "
            f"name on the Hugging Face hub ({first_line(error)})"
        ) from error


def stack_config(model_config: Any) -> Any:
    """Return the part of a model's configuration that describes its text layers."""
    if is_encoder(model_config):
        return getattr(model_config, "encoder", model_config)  # T5Gemma keeps two, T5 one
    return model_config.get_text_config()


def is_encoder(model_config: Any) -> bool:
    """Return whether the text is encoded by an encoder: one whose decoder is left out, or one saved alone."""
    alone = any(name.endswith("EncoderModel") for name in model_config.architectures or ())
    return model_config.is_encoder_decoder or alone


def shape_of(config: TextEncoderConfig, stack: Any, total_layers: int | None = None) -> TextShape:
    """Return the sizes of the features of a stack of text layers, which may be cut from ``total_layers``."""
    if getattr(stack, "is_heterogeneous", False):  # in Gemma 4 the heads differ between layers
        stack, total_layers = stack.per_layer_config[0], total_layers or stack.num_hidden_layers
    heads = getattr(stack, "num_attention_heads", None) or 0  # Mamba has none
    total_layers = total_layers or stack.num_hidden_layers
    head_dim = getattr(stack, "head_dim", None) or getattr(stack, "d_kv", None)
    return TextShape(
        layers=resolve_layers(config.layers, total_layers),
        total_layers=total_layers,
        width=stack.hidden_size,
        kv_heads=getattr(stack, "num_key_value_heads", None) or heads,
        head_dim=head_dim or (stack.hidden_size // heads if heads else 0),
    )


def cut_layers(stack: Any, keep: int) -> None:
    """Reduce a configuration, and its lists with one entry for each layer, to the first ``keep`` layers."""
    total = stack.num_hidden_layers
    for name, value in [*vars(stack).items()]:  # layer_types, mlp_layer_types, no_rope_layers
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(stack, name, value[:keep])
    if shared := getattr(stack, "num_kv_shared_layers", None):  # the last ones of Gemma 4
        stack.num_kv_shared_layers = max(0, shared - (total - keep))
    stack.num_hidden_layers = keep


def find_layers(model: Any) -> tuple[nn.ModuleList, bool]:
    """Return the layers of a text model, and whether it is a decoder; ValueError if it has no list of layers."""
    depth = getattr(model.config, "encoder", stack_config(model.config)).num_hidden_layers  # of T5Gemma's two
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(f"{type(model).__name__} is not a supported text encoder: it has no list of {depth} layers")
    name, layers = min(lists, key=lambda item: item[0].count("."))
    return layers, "encoder" not in name.split(".") and name != "block"


def positions(model: nn.Module) -> int | None:
    """Return the number of learned positions; None for a model that computes them."""
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last):
            # RoBERTa counts from the padding's number on, OPT from an offset.
            unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - unused)
    return min(found, default=None)


def has_experts(model: Any) -> bool:
    """Return whether the model has experts, whose products' shapes depend on the other tokens of the batch."""
    stack = stack_config(model.config)
    return any((getattr(stack, name, None) or 0) > 1 for name in EXPERTS)
