"""Weights of a language model: those of the text layers that are used, and no others."""

from __future__ import annotations

import json
from typing import Any

from safetensors import SafetensorError
from torch import nn

from semantic_routing.text.architecture import UNFIT, cut_layers, is_encoder, stack_config
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.gguf import load_gguf
from semantic_routing.text.quiet import first_line, quiet_transformers
from semantic_routing.text.source import Source

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
"""Packages that transformers needs to read quantised weights, by method."""


def load_model(config: TextEncoderConfig, source: Source, model_config: Any, keep: int) -> nn.Module:
    """Load the text model with its first ``keep`` layers; other weights in the files are not kept in memory.

    Raises ValueError, which names the fault, if the weights are incomplete or do not match ``model_config``.
    """
    stack = stack_config(model_config)
    cut_layers(stack, keep)
    if stack.model_type in UNFIT:
        raise ValueError(f"{stack.model_type} is not supported as a text encoder: {UNFIT[stack.model_type]}")
    quantised = _quantisation(model_config, stack)
    try:
        if source.file is not None:
            model, report = load_gguf(source, stack, keep, config.dtype)
        else:
            model, report = _load_safetensors(config, source.place, model_config, quantised)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"no complete safetensors weights in {config.name_or_path!r}: {first_line(error)}") from error
    except (ImportError, RuntimeError, ValueError, AssertionError) as error:
        if quantised:
            raise ValueError(_unread(config, quantised, error)) from error
        if isinstance(error, (RuntimeError, AssertionError)):
            raise
        raise ValueError(
            f"{config.name_or_path!r} ({model_config.model_type}) does not load as a text encoder: {first_line(error)}"
        ) from error
    _check_report(report, config.name_or_path)
    # transformers would save the model by names turned back through the key mapping, which nothing can load.
    vars(model).pop("_weight_conversions", None)
    return model


def _load_safetensors(
    config: TextEncoderConfig, place: str, model_config: Any, quantised: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Load safetensors from a folder or the hub; also return transformers' loading report."""
    from transformers import AutoModel, AutoModelForTextEncoding

    stack, encoder = stack_config(model_config), is_encoder(model_config)
    if encoder:
        model_config.is_encoder_decoder = False  # T5Gemma's switch for "the encoder alone"
    elif quantised:
        stack.quantization_config = quantised  # multimodal models have it outside of their text's configuration
    with quiet_transformers():
        return (AutoModelForTextEncoding if encoder else AutoModel).from_pretrained(
            place,
            config=model_config if encoder else stack,
            dtype=config.dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are in the report
            output_loading_info=True,
            # Where multimodal checkpoints keep their text model (Qwen-VL, Gemma 3, Mistral 3).
            key_mapping={r"^(?:model\.)?language_model\.(?:model\.)?": ""},
        )


def _check_report(report: dict[str, Any], name: str) -> None:
    """Raise ValueError if tensors are missing or have another shape than the model's."""
    # A pooler, which masked language models are saved without, comes after the states.
    if missing := sorted(key for key in report["missing_keys"] if not key.startswith("pooler.")):
        raise ValueError(f"the weights in {name!r} lack {len(missing)} tensors of its text model, first {missing[0]}")
    if wrong := sorted(report["mismatched_keys"]):
        key, stored, expected = wrong[0]
        raise ValueError(
            f"{len(wrong)} weights in {name!r} do not fit its configuration, first {key}: "
            f"{[*stored]} in the file, {[*expected]} in the model"
        )


def _quantisation(*configs: Any) -> dict[str, Any]:
    """Return the quantisation settings of the first configuration that has some, else an empty dict."""
    found: Any = next((q for c in configs if (q := getattr(c, "quantization_config", None))), {})
    return found if isinstance(found, dict) else found.to_dict()


def _unread(config: TextEncoderConfig, quantised: dict[str, Any], error: Exception) -> str:
    """Return the error message for quantised weights that cannot be loaded here."""
    method = quantised.get("quant_method", "bitsandbytes" if any("load_in" in key for key in quantised) else "unnamed")
    method = str(getattr(method, "value", method))
    need = LIBRARIES.get(method.removesuffix("_4bit").removesuffix("_8bit"), "what this method needs")
    return (
        f"the weights in {config.name_or_path!r} are quantised ({method}): install {need}, use a GPU where it asks "
        f"for one, or use the model's unquantised weights ({first_line(error)})"
    )
