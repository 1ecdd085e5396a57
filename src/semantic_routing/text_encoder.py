"""A frozen language model that turns prompts into ``TextFeatures``.

Any Hugging Face decoder (Qwen3, Llama, Mistral, Gemma ...) and any T5-like encoder, from a folder or the hub;
of a multimodal model only the text half is loaded. ``output_hidden_states`` is not used: what its last entry
means changed between transformers releases. Forward hooks take the states instead, so layer ``l`` is the
output of decoder layer ``l`` and the model's last layer is taken after the final norm. Layers above the
highest one asked for are never built, and the language-model head is never run.
"""

from __future__ import annotations

import gc
import json
import re
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError
from torch import Tensor, nn

from semantic_routing.features import TextFeatures


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


def text_shape(config: TextEncoderConfig) -> TextShape:
    """Sizes of an encoder's features, read from the model's configuration without loading its weights."""
    return _shape(config, _stack_config(_model_config(config.name_or_path)))


class TextEncoder:
    """A frozen language model; ``encode`` gives the states of the chosen layers for a batch of prompts."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: TextEncoderConfig, shape: TextShape) -> None:
        """Prefer ``from_pretrained``. ``model`` holds the layers up to ``shape.layers[-1]`` and no more."""
        _parts(model)  # an unknown architecture is an error now rather than at the first prompt
        self.config = config
        self.shape = shape
        self._model: nn.Module | None = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._reads_on: torch.device | None = None  # with ``offload``, where the weights are not

    @classmethod
    def from_pretrained(cls, config: TextEncoderConfig | str | Path, device: torch.device | str = "cpu") -> TextEncoder:
        """Load the text model that ``config`` (or a bare folder or hub name) describes.

        Raises ValueError where there is no such model, its weights are not safetensors or do not fill it, or
        it lacks a layer asked for.
        """
        if not isinstance(config, TextEncoderConfig):
            config = TextEncoderConfig(name_or_path=str(config))
        model_config = _model_config(config.name_or_path)
        shape = _shape(config, _stack_config(model_config))
        tokenizer = _load_tokenizer(config)
        model = _load_model(config, model_config, keep=shape.layers[-1])
        return cls(model, tokenizer, config, shape).to(device)

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any, config: TextEncoderConfig, total_layers: int) -> TextEncoder:
        """An encoder around a text model of transformers that was loaded elsewhere and is frozen here.

        ``total_layers`` is the depth of the language model that it was cut from. ValueError where the model has
        fewer layers than ``config`` asks for.
        """
        held = _stack_config(model.config)
        shape = _shape(config, held, total_layers)
        if shape.layers[-1] > held.num_hidden_layers:
            raise ValueError(
                f"layer {shape.layers[-1]} of {config.name_or_path!r} is asked for, but the text encoder holds "
                f"{held.num_hidden_layers} layers"
            )
        tokenizer.truncation_side = "right"
        return cls(model, tokenizer, config, shape)

    @property
    def num_layers(self) -> int:
        """Number L of layers returned."""
        return len(self.shape.layers)

    @property
    def width(self) -> int:
        """Width C of a state."""
        return self.shape.width

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Key and value heads, and the width of one head: (Hkv, hd)."""
        return self.shape.kv_heads, self.shape.head_dim

    @property
    def model(self) -> nn.Module:
        """The language model; RuntimeError after ``unload``."""
        if self._model is None:
            raise RuntimeError("the text encoder was unloaded; load it again with TextEncoder.from_pretrained")
        return self._model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers that belongs to the model."""
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where prompts are read and the features will be."""
        device = self._reads_on or next(self.model.parameters()).device
        # Weights that accelerate offloaded layer by layer are on the meta device; its hooks move what they read.
        return torch.device("cpu") if device.type == "meta" else device

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights, for example ``to("cpu")`` to make room on a GPU and back; returns itself.

        With ``offload`` they stay in main memory until there are prompts to read.
        """
        if self.config.offload:
            self._reads_on = torch.device(device)
        else:
            self.model.to(device=device)
        return self

    def compile(self) -> TextEncoder:
        """Compile the layers, a graph for each shape of batch: slower to start, faster; returns itself.

        States differ from uncompiled ones by rounding.
        """
        for layer in _parts(self.model)[0]:
            # The forward and not the module: the hooks that take the states stay outside of the graph.
            layer.forward = torch.compile(layer.forward, dynamic=False)
        return self

    def unload(self) -> None:
        """Free the weights. Features already made stay valid; encoding again is an error."""
        self._model = None
        gc.collect()  # transformers' modules sit in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()  # not inference_mode: autograd refuses to save its tensors for the router's backward
    def encode(self, prompts: Sequence[str], *, with_kv: bool = False) -> TextFeatures:
        """States of the chosen layers for each prompt; with ``with_kv`` also attention keys and values.

        A prompt's features do not depend on the rest of its batch: padding is on the right, masked, and holds
        finite values without meaning. Keys are as the model's attention uses them (after its own norm and
        rotary embedding, before heads are repeated). A prompt without any token ("" where the tokenizer adds
        none) becomes the one token that begins, or else ends or pads, a text: this is the null prompt.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("encode expects a non-empty list of prompts, such as ['a red circle']")
        ids, mask = (x.to(self.device) for x in self._tokenize(prompts))
        layers, norm, is_decoder = _parts(self.model)
        if with_kv and not is_decoder:
            raise ValueError(f"{self.config.name_or_path} is an encoder; keys and values need a decoder")
        options: dict[str, Any] = {"use_cache": with_kv} if is_decoder else {}
        if with_kv:
            from transformers import DynamicCache

            options["past_key_values"] = DynamicCache()  # given no config, so sliding layers keep all tokens
        whole = len(layers) == self.shape.total_layers
        taps = [norm if whole and i == len(layers) else layers[i - 1] for i in self.shape.layers]
        # A caller's autocast would change the states from run to run of different settings.
        with self._at_hand(), torch.autocast(self.device.type, enabled=False), _record(taps) as states:
            self.model(input_ids=ids, attention_mask=mask.long(), **options)
        if not with_kv:
            return TextFeatures(torch.stack(states), mask)
        cached = [options["past_key_values"].layers[i - 1] for i in self.shape.layers]
        keys, values = torch.stack([c.keys for c in cached]), torch.stack([c.values for c in cached])
        return TextFeatures(torch.stack(states), mask, keys, values)

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Weights that ``offload`` keeps in main memory are on the device while the context lasts."""
        if self._reads_on is None:
            yield
            return
        self.model.to(self._reads_on)
        try:
            yield
        finally:
            self.model.to("cpu")

    def _tokenize(self, prompts: Sequence[str]) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """Token ids padded on the right to a bucket, and the mask of real tokens."""
        texts, special = [self.config.prefix + prompt for prompt in prompts], True
        if self.config.chat_template:
            special = False  # the template writes them
            texts = [
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
                )
                for text in texts
            ]
        rows = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        limit = self.config.max_tokens
        if long := [i for i, row in enumerate(rows) if len(row) > limit]:
            dropped = sum(len(rows[i]) - limit for i in long)
            warnings.warn(
                f"{dropped} tokens dropped from {len(long)} of {len(rows)} prompts, longer than {limit}",
                stacklevel=3,
            )
            for i in long:  # by the tokenizer, which keeps a closing token such as T5's </s>
                cut = self._tokenizer(texts[i], add_special_tokens=special, truncation=True, max_length=limit)
                rows[i] = cut["input_ids"]
        rows = [row or [self._null_token] for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(self._bucket(int(lengths.max()))) < lengths[:, None]
        ids = torch.full(mask.shape, self._tokenizer.pad_token_id or 0)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids, mask

    @property
    def _null_token(self) -> int:
        """The token that stands for a text without tokens."""
        tokenizer = self._tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            if token is not None:
                return token
        raise ValueError(
            f"the tokenizer of {self.config.name_or_path} has no BOS, EOS or PAD token for an empty prompt"
        )

    def _bucket(self, length: int) -> int:
        """Smallest bucket that holds ``length`` tokens, never above ``max_tokens``."""
        index = bisect_left(self.config.buckets, length)
        bucket = self.config.buckets[index] if index < len(self.config.buckets) else self.config.max_tokens
        return min(bucket, self.config.max_tokens)


@contextmanager
def _record(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the outputs of ``modules``, in order, while the context lasts."""
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)  # T5's blocks return tuples

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: Any) -> tuple[nn.ModuleList, nn.Module, bool]:
    """The layers of a text model, its final norm, and whether it is a decoder."""
    stack = getattr(model, "encoder", model)
    if hasattr(stack, "layers"):
        return stack.layers, stack.norm, stack is model
    if hasattr(stack, "block"):
        return stack.block, stack.final_layer_norm, False  # T5's names
    raise ValueError(
        f"{type(model).__name__} is not a supported text encoder; expected a decoder such as Qwen3, Llama, "
        "Mistral or Gemma, or an encoder such as T5 or T5Gemma"
    )


def _model_config(name_or_path: str) -> Any:
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


def _stack_config(model_config: Any) -> Any:
    """The part of a model's configuration that describes its text layers."""
    if _is_encoder(model_config):
        return getattr(model_config, "encoder", model_config)  # T5Gemma keeps two, T5 one
    return model_config.get_text_config()


def _is_encoder(model_config: Any) -> bool:
    """Whether an encoder reads the text: with a decoder that is left out, or saved by itself."""
    alone = any(name.endswith("EncoderModel") for name in model_config.architectures or ())
    return model_config.is_encoder_decoder or alone


def _shape(config: TextEncoderConfig, stack: Any, total_layers: int | None = None) -> TextShape:
    heads = stack.num_attention_heads
    total_layers = total_layers or stack.num_hidden_layers
    return TextShape(
        layers=resolve_layers(config.layers, total_layers),
        total_layers=total_layers,
        width=stack.hidden_size,
        kv_heads=getattr(stack, "num_key_value_heads", None) or heads,
        head_dim=getattr(stack, "head_dim", None) or getattr(stack, "d_kv", None) or stack.hidden_size // heads,
    )


def _load_tokenizer(config: TextEncoderConfig) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
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


def _load_model(config: TextEncoderConfig, model_config: Any, keep: int) -> nn.Module:
    """The text model with its first ``keep`` layers; the other weights of the files are never read."""
    from transformers import AutoModel, AutoModelForTextEncoding

    stack, encoder = _stack_config(model_config), _is_encoder(model_config)
    if getattr(stack, "layer_types", None):
        stack.layer_types = stack.layer_types[:keep]
    stack.num_hidden_layers = keep
    if encoder:
        model_config.is_encoder_decoder = False  # T5Gemma's switch for "the encoder alone"
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
    if missing := sorted(info["missing_keys"]):
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
