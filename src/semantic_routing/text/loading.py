"""What is loaded of a language model: its configuration and sizes, its tokenizer, the weights of the layers kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from safetensors import SafetensorError
from torch import nn


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Which language model reads the prompts, which of its layers are kept, and how prompts are prepared."""

    name_or_path: str
    """A folder written by ``save_pretrained``, or a name on the Hugging Face hub. Safetensors only."""
    layers: str | tuple[int, ...] = "all"
    """Layers to return, counted from 1: "all", a range "6..29" (both ends included), or a list "9,18,27"."""
    max_tokens: int = 512
    """Longer prompts are cut here, with a warning."""
    buckets: tuple[int, ...] = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    """A batch is padded to its longest prompt, rounded up to one of these, so that few shapes occur.

    Below 16 tokens a CPU's vectors sum in another order, and a prompt's states would depend on its batch.
    """
    prefix: str = ""
    """Instruction put before every prompt, the empty one included, such as "Describe this image. "."""
    chat_template: bool = False
    """Wrap prefix and prompt as a user's message in the model's own chat template."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point type of weights and states; "auto" is the one the weights are stored in."""
    offload: bool = False
    """Keep the weights in main memory and move them to the device only while they read prompts."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets {self.buckets} must be positive lengths in increasing order")


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Sizes of the features that an encoder returns, known from its configuration alone."""

    layers: tuple[int, ...]
    """The layers returned, counted from 1."""
    total_layers: int
    """Layers of the whole language model."""
    width: int
    """Width C of a state."""
    kv_heads: int
    """Key and value heads Hkv of one attention."""
    head_dim: int
    """Width hd of one head."""


def resolve_layers(layers: str | Sequence[int], total: int) -> tuple[int, ...]:
    """The layers that "all", "6..29", "9,18,27" or numbers mean in a model of ``total`` layers.

    Raises ValueError for anything that is not a strictly increasing choice from 1..total.
    """
    if isinstance(layers, str):
        text = layers.replace(" ", "")
        if text == "all":
            return tuple(range(1, total + 1))
        if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
            chosen = tuple(range(int(match[1]), int(match[2]) + 1))
        elif re.fullmatch(r"\d+(,\d+)*", text):
            chosen = tuple(int(number) for number in text.split(","))
        else:
            raise ValueError(f'layers {layers!r} not understood; expected "all", a range "6..29" or a list "9,18"')
    else:
        chosen = tuple(layers)
    if not chosen or list(chosen) != sorted(set(chosen)) or chosen[0] < 1 or chosen[-1] > total:
        raise ValueError(f"layers {layers!r} must be an increasing choice from 1..{total}, the language model's layers")
    return chosen


UNFIT = {
    "convbert": "its states depend on padding",
    "fnet": "its states depend on padding",
    "gemma3n_text": "its layers hold four states",
    "mobilebert": "its states depend on padding",
    "nemotron_h": "its last state is not always the model's own",
    "nystromformer": "its states depend on padding",
    "yoso": "its states depend on padding",
    "flaubert": "its layers are no modules",
    "xlm": "its layers are no modules",
}
"""Architectures that transformers loads and whose features would be wrong."""
LIBRARIES = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fbgemm_fp8": "kernels",
    "fp8": "kernels",
    "gptq": "optimum and gptqmodel",
    "hqq": "hqq",
    "mxfp4": "kernels",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""What transformers needs to read weights quantised by a method."""


def text_shape(config: TextEncoderConfig) -> TextShape:
    """Sizes of an encoder's features, read from the model's configuration without loading its weights."""
    return shape_of(config, stack_config(model_config(config.name_or_path)))


def model_config(name_or_path: str) -> Any:
    """The model's own configuration; of a multimodal model the whole."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"no text encoder at {name_or_path!r}; expected a folder written by save_pretrained or a model's "
            f"name on the Hugging Face hub ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip()}" if first.endswith(":") else first


def stack_config(model_config: Any) -> Any:
    """The part of a model's configuration that describes its text layers."""
    if _is_encoder(model_config):
        return getattr(model_config, "encoder", model_config)  # T5Gemma keeps two, T5 one
    return model_config.get_text_config()


def _is_encoder(model_config: Any) -> bool:
    """Whether an encoder reads the text: with a decoder that is left out, or saved by itself."""
    alone = any(name.endswith("EncoderModel") for name in model_config.architectures or ())
    return model_config.is_encoder_decoder or alone


def shape_of(config: TextEncoderConfig, stack: Any, total_layers: int | None = None) -> TextShape:
    if getattr(stack, "is_heterogeneous", False):  # Gemma 4 has heads of its own in some layers
        stack, total_layers = stack.per_layer_config[0], total_layers or stack.num_hidden_layers
    heads = getattr(stack, "num_attention_heads", None) or 0  # none in Mamba
    total_layers = total_layers or stack.num_hidden_layers
    return TextShape(
        layers=resolve_layers(config.layers, total_layers),
        total_layers=total_layers,
        width=stack.hidden_size,
        kv_heads=getattr(stack, "num_key_value_heads", None) or heads,
        head_dim=_head_dim(stack, heads),
    )


def _head_dim(stack: Any, heads: int) -> int:
    given = getattr(stack, "head_dim", None) or getattr(stack, "d_kv", None)
    return given or (stack.hidden_size // heads if heads else 0)


def load_tokenizer(config: TextEncoderConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(
            f"{config.name_or_path!r} has no tokenizer that transformers can load: {_first_line(error)}"
        ) from error
    # Where the files are missing transformers may make a tokenizer that knows special tokens alone.
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        raise ValueError(f"{config.name_or_path!r} has no tokenizer: save one there with save_pretrained")
    if config.chat_template and tokenizer.chat_template is None:
        raise ValueError(f"{config.name_or_path!r} has no chat template; set chat_template=False")
    tokenizer.truncation_side = "right"
    return tokenizer


def _cut(stack: Any, keep: int) -> None:
    """Leave the first ``keep`` layers of a configuration, and what it lists for each of them."""
    total = stack.num_hidden_layers
    for name, value in [*vars(stack).items()]:  # layer_types, mlp_layer_types, no_rope_layers
        if "layer" in name and isinstance(value, list) and len(value) == total:
            setattr(stack, name, value[:keep])
    if shared := getattr(stack, "num_kv_shared_layers", None):  # the last ones of Gemma 4
        stack.num_kv_shared_layers = max(0, shared - (total - keep))
    stack.num_hidden_layers = keep


def load_model(config: TextEncoderConfig, model_config: Any, keep: int) -> nn.Module:
    """The text model with its first ``keep`` layers; the other weights of the files are never read."""
    from transformers import AutoModel, AutoModelForTextEncoding

    stack, encoder = stack_config(model_config), _is_encoder(model_config)
    _cut(stack, keep)
    if encoder:
        model_config.is_encoder_decoder = False  # T5Gemma's switch for "the encoder alone"
    if stack.model_type in UNFIT:
        raise ValueError(f"{stack.model_type} is not supported as a text encoder: {UNFIT[stack.model_type]}")
    quantised = _quantisation(model_config, stack)
    if quantised and not encoder:
        stack.quantization_config = quantised  # multimodal models have it outside of their text's configuration
    try:
        with quiet_transformers():
            model, info = (AutoModelForTextEncoding if encoder else AutoModel).from_pretrained(
                config.name_or_path,
                config=model_config if encoder else stack,
                dtype=config.dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                # Where multimodal checkpoints keep their text model (Qwen-VL, Gemma 3, Mistral 3).
                key_mapping={r"^(?:model\.)?language_model\.(?:model\.)?": ""},
            )
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"no whole safetensors weights in {config.name_or_path!r}: {_first_line(error)}") from error
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        if quantised:
            raise ValueError(_unread(config, quantised, error)) from error
        if isinstance(error, (RuntimeError, AssertionError)):
            raise
        raise ValueError(
            f"{config.name_or_path!r} ({model_config.model_type}) does not load as a text encoder: {_first_line(error)}"
        ) from error
    # A pooler, which masked language models are saved without, comes after the states.
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise ValueError(
            f"the weights in {config.name_or_path!r} lack {len(missing)} tensors of its text model, first {missing[0]}"
        )
    if wrong := sorted(info["mismatched_keys"]):
        name, stored, expected = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights in {config.name_or_path!r} do not fit its config.json, first {name}: "
            f"{[*stored]} in the file, {[*expected]} in the model"
        )
    # transformers would save the model by names turned back through the pattern above, which nothing can load.
    vars(model).pop("_weight_conversions", None)
    return model


def _quantisation(*configs: Any) -> dict[str, Any]:
    """Settings by which weights were quantised, from the first configuration that has them; none: empty."""
    found: Any = next((q for c in configs if (q := getattr(c, "quantization_config", None))), {})
    return found if isinstance(found, dict) else found.to_dict()


def _unread(config: TextEncoderConfig, quantised: dict[str, Any], error: Exception) -> str:
    """Say what to do where quantised weights cannot be read here."""
    method = quantised.get("quant_method", "bitsandbytes" if any("load_in" in key for key in quantised) else "unnamed")
    method = str(getattr(method, "value", method))
    need = LIBRARIES.get(method.removesuffix("_4bit").removesuffix("_8bit"), "what this method needs")
    return (
        f"the weights in {config.name_or_path!r} are quantised ({method}): install {need}, use a GPU where it asks "
        f"for one, or use the model's unquantised weights ({_first_line(error)})"
    )


def check_sizes(model: Any, tokenizer: Any, config: TextEncoderConfig) -> None:
    """ValueError where the tokenizer has tokens, or ``max_tokens`` positions, that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    # Special tokens that no prompt holds may lie beyond: Gemma 3's mark of an image, in its text-only models, or a
    # padding token that was added. Those that begin or end every text count.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    last = max({*tokenizer.get_vocab().values()} - special | {*tokenizer("")["input_ids"]})
    if last >= rows:
        raise ValueError(
            f"the tokenizer of {config.name_or_path!r} has tokens up to {last}, but its model embeds {rows}: "
            "it belongs to another model"
        )
    if (known := positions(model)) is not None and known < config.max_tokens:
        raise ValueError(
            f"max_tokens is {config.max_tokens}, but {config.name_or_path!r} has {known} positions: lower max_tokens"
        )


def positions(model: nn.Module) -> int | None:
    """How many positions a model has learned; None where it computes them."""
    found = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (last == "wpe" or "position" in last):
            # RoBERTa counts from the padding's number on, OPT from an offset.
            unused = getattr(module, "offset", 0) if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - unused)
    return min(found, default=None)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and its report of unused weights: leaving some unread is meant."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


TINY = "tiny"
"""Name of the text encoder that a run makes for itself (``training/tiny_lm.py``); "tiny:4x64" has 4 layers of 64."""


def tiny_sizes(name: str) -> dict[str, Any] | None:
    """Read the sizes of a tiny language model off its name: "tiny", "tiny:LAYERSxWIDTH" or "tiny:LAYERSxWIDTHxSTEPS".

    Returns arguments of ``tiny_lm``; None for the name of another text encoder.
    """
    found = re.fullmatch(rf"{TINY}(?::(\d+)x(\d+)(?:x(\d+))?)?", name)
    if found is None:
        return None
    return {key: int(size) for key, size in zip(("layers", "width", "steps"), found.groups(), strict=True) if size}
