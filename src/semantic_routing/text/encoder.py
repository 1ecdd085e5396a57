"""A frozen language model that turns prompts into ``TextFeatures``.

Decoders and encoders of Hugging Face, from a folder or the hub; of a multimodal model only the text half is
loaded. ``output_hidden_states`` is not used: what its last entry means changed between transformers releases.
Forward hooks take the states instead, so layer ``l`` is the output of decoder layer ``l``; the model's last layer
is its own ``last_hidden_state``, after the final norm. Layers above the highest one asked for are never built,
and the language-model head is never run.
"""

from __future__ import annotations

import gc
import inspect
import threading
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from semantic_routing.text.chat_template import in_chat
from semantic_routing.text.features import TextFeatures
from semantic_routing.text.loading import (
    TextEncoderConfig,
    TextShape,
    check_sizes,
    load_model,
    load_tokenizer,
    model_config,
    positions,
    quiet_transformers,
    resolve_layers,
    shape_of,
    stack_config,
    text_shape,
)

__all__ = ["TextEncoder", "TextEncoderConfig", "TextShape", "quiet_transformers", "resolve_layers", "text_shape"]

_SHARED = threading.RLock()
"""Held while a tokenizer works, or a module gets its hook: other threads may have the same ones."""
_TAPPED: WeakSet[nn.Module] = WeakSet()
_CALL: ContextVar[dict[nn.Module, Any] | None] = ContextVar("_CALL", default=None)
"""What the layers put out in the call in progress, which is this thread's own."""


class TextEncoder:
    """A frozen language model; ``encode`` gives the states of the chosen layers for a batch of prompts."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: TextEncoderConfig, shape: TextShape) -> None:
        """Prefer ``from_pretrained``. ``model`` holds the layers up to ``shape.layers[-1]`` and no more."""
        _parts(model)  # an unknown architecture is an error now rather than at the first prompt
        self.config = config
        self.shape = shape
        self._model: nn.Module | None = model.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self._limit = min(config.max_tokens, positions(model) or config.max_tokens)
        self._moving = threading.Lock()
        self._reads_on: torch.device | None = None  # with ``offload``, where the weights are not

    @classmethod
    def from_pretrained(cls, config: TextEncoderConfig | str | Path, device: torch.device | str = "cpu") -> TextEncoder:
        """Load the text model that ``config`` (or a bare folder or hub name) describes.

        Raises ValueError where there is no such model, its weights are not safetensors or do not fill it, or
        it lacks a layer asked for.
        """
        if not isinstance(config, TextEncoderConfig):
            config = TextEncoderConfig(name_or_path=str(config))
        whole = model_config(config.name_or_path)
        shape = shape_of(config, stack_config(whole))
        tokenizer = load_tokenizer(config)
        model = load_model(config, whole, keep=shape.layers[-1])
        check_sizes(model, tokenizer, config)
        return cls(model, tokenizer, config, shape).to(device)

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any, config: TextEncoderConfig, total_layers: int) -> TextEncoder:
        """An encoder around a text model of transformers that was loaded elsewhere and is frozen here.

        ``total_layers`` is the depth of the language model that it was cut from. ValueError where the model has
        fewer layers than ``config`` asks for.
        """
        held = stack_config(model.config)
        shape = shape_of(config, held, total_layers)
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
    def encode(self, prompts: Sequence[str], *, with_kv: bool = False, strict: bool = True) -> TextFeatures:
        """States of the chosen layers for each prompt; with ``with_kv`` also attention keys and values.

        A prompt's features do not depend on the rest of its batch: padding is on the right, masked, and holds
        finite values without meaning. Keys are as the model's attention uses them (after its own norm and
        rotary embedding, before heads are repeated). A prompt without any token ("" where the tokenizer adds
        none) becomes the one token that begins, or else ends or pads, a text: this is the null prompt.

        A prompt that does not reach the model, because the tokenizer knows nothing of it or the chat template changes
        it, is a ValueError; where not ``strict``, as in training on captions of all sorts, a warning.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("encode expects a non-empty list of prompts, such as ['a red circle']")
        with _SHARED:
            ids, mask = (x.to(self.device) for x in self._tokenize(prompts, strict))
        layers, is_decoder = _parts(self.model)
        if with_kv and not is_decoder:
            raise ValueError(f"{self.config.name_or_path} is an encoder; keys and values need a decoder")
        if with_kv and not self.shape.kv_heads:
            raise ValueError(f"{self.config.name_or_path} has no attention, whose keys and values fusedit reads")
        options: dict[str, Any] = {"use_cache": with_kv} if is_decoder else {}
        if with_kv:
            from transformers import DynamicCache

            own = DynamicCache(config=self.model.config).layers
            if any(hasattr(layer, "conv_states") for layer in own):  # LFM2, Jamba, Qwen3.5
                raise ValueError(f"{self.config.name_or_path} has layers without keys, which fusedit cannot read")
            options["past_key_values"] = DynamicCache()  # given no config, so sliding layers keep all tokens
        options = {k: v for k, v in options.items() if k in inspect.signature(self.model.forward).parameters}
        # A caller's autocast would change the states from run to run of different settings.
        with self._at_hand(), torch.autocast(self.device.type, enabled=False), _recorded(layers) as put_out:
            last = self.model(input_ids=ids, attention_mask=mask.long(), **options).last_hidden_state
        whole = len(layers) == self.shape.total_layers
        states: list[Any] = [
            last if whole and i == len(layers) else put_out.get(layers[i - 1]) for i in self.shape.layers
        ]
        if any(getattr(state, "shape", None) != (*ids.shape, self.shape.width) for state in states):
            raise ValueError(
                f"{type(self.model).__name__} is not a supported text encoder: its layers hold no one state"
            )
        if not with_kv:
            return TextFeatures(torch.stack(states), mask)
        return TextFeatures(torch.stack(states), mask, *self._keys(options.get("past_key_values")))

    def _keys(self, cache: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of the layers returned; ValueError where they are not those of one kind of attention."""
        held = [] if cache is None else cache.layers
        if len(held) < self.shape.layers[-1]:
            raise ValueError(f"{self.config.name_or_path} keeps no keys and values of each layer, which fusedit reads")
        cached = [held[i - 1] for i in self.shape.layers]
        keys: list[Any]
        values: list[Any]
        keys, values = ([getattr(c, name, None) for c in cached] for name in ("keys", "values"))
        if len({getattr(x, "shape", None) for x in (*keys, *values)}) > 1 or keys[0] is None:
            raise ValueError(f"the layers of {self.config.name_or_path} have unlike keys, which fusedit cannot read")
        return torch.stack(keys), torch.stack(values)

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Weights that ``offload`` keeps in main memory are on the device while the context lasts."""
        if self._reads_on is None:
            yield
            return
        with self._moving:  # no other thread takes the weights away meanwhile
            self.model.to(self._reads_on)
            try:
                yield
            finally:
                self.model.to("cpu")

    def _tokenize(self, prompts: Sequence[str], strict: bool) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """Token ids padded on the right to a bucket, and the mask of real tokens."""
        texts, special = [self.config.prefix + prompt for prompt in prompts], True
        if self.config.chat_template:
            special = False  # the template writes them
            texts = in_chat(self._tokenizer, texts, self.config.name_or_path, strict=strict)
        rows = self._tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        self._check_readable(prompts, rows, strict)
        limit = self._limit
        if long := [i for i, row in enumerate(rows) if len(row) > limit]:
            for i in long:
                self._check_room(texts[i], prompts[i], special)
            dropped = sum(len(rows[i]) - limit for i in long)
            warnings.warn(
                f"{dropped} tokens dropped from {len(long)} of {len(rows)} prompts, longer than {limit}",
                stacklevel=3,
            )
            for i in long:  # by the tokenizer, which keeps a closing token such as T5's </s>
                cut = self._tokenizer(texts[i], add_special_tokens=special, truncation=True, max_length=limit)
                rows[i] = cut["input_ids"]
        rows = [row or [self._null_token] for row in rows]
        if (largest := max(map(max, rows))) >= self._rows:
            raise ValueError(
                f"the tokenizer of {self.config.name_or_path!r} gives {largest}, but its model embeds {self._rows}"
            )
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(self._bucket(int(lengths.max()))) < lengths[:, None]
        pad = self._tokenizer.pad_token_id or 0
        ids = torch.full(mask.shape, pad if 0 <= pad < self._rows else 0)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids, mask

    def _check_readable(self, prompts: Sequence[str], rows: Sequence[list[int]], strict: bool) -> None:
        """Raise ValueError, or warn, where the tokenizer knows nothing of a prompt that is not blank."""
        if self.config.prefix or self.config.chat_template:  # whose tokens do not count
            rows = self._tokenizer([*prompts], add_special_tokens=False, verbose=False)["input_ids"]
        special = {*self._tokenizer.all_special_ids}
        marks = {*self._tokenizer.all_special_tokens}
        lost = [
            prompt
            for prompt, row in zip(prompts, rows, strict=True)
            if not set(row) - special and prompt.strip() and prompt.strip() not in marks
        ]
        if not lost:
            return
        what = f"the tokenizer of {self.config.name_or_path!r} knows nothing of {lost[0][:80]!r}"
        if strict:
            raise ValueError(what)
        warnings.warn(what, stacklevel=4)

    def _check_room(self, text: str, prompt: str, special: bool) -> None:
        """ValueError where what stands before a prompt fills all tokens that are kept."""
        before = text[: max(0, text.rfind(prompt))]
        if prompt and before and len(self._tokenizer(before, add_special_tokens=special)["input_ids"]) >= self._limit:
            raise ValueError(
                f"nothing of {prompt[:80]!r} is left in {self._limit} tokens: shorten prefix or chat template, "
                "or raise max_tokens"
            )

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
        """Smallest bucket that holds ``length`` tokens, never above the limit."""
        index = bisect_left(self.config.buckets, length)
        bucket = self.config.buckets[index] if index < len(self.config.buckets) else self._limit
        return min(bucket, self._limit)


@contextmanager
def _recorded(modules: nn.ModuleList) -> Iterator[dict[nn.Module, Tensor]]:
    """Collect what ``modules`` put out in this thread while the context lasts."""
    with _SHARED:
        for module in modules:
            if module not in _TAPPED:
                module.register_forward_hook(_keep)  # for good: it does nothing outside of this context
                _TAPPED.add(module)
    states: dict[nn.Module, Tensor] = {}
    token = _CALL.set(states)
    try:
        yield states
    finally:
        _CALL.reset(token)


def _keep(module: nn.Module, inputs: Any, output: Any) -> None:
    if (states := _CALL.get()) is not None:
        states[module] = output[0] if isinstance(output, (tuple, list)) else output  # T5's blocks, GPT's


def _parts(model: Any) -> tuple[nn.ModuleList, bool]:
    """The layers of a text model, and whether it is a decoder."""
    depth = getattr(model.config, "encoder", stack_config(model.config)).num_hidden_layers  # of T5Gemma's two
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ValueError(f"{type(model).__name__} is not a supported text encoder: it has no list of {depth} layers")
    name, layers = min(lists, key=lambda item: item[0].count("."))
    return layers, "encoder" not in name.split(".") and name != "block"
