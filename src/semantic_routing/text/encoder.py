"""A frozen language model that turns prompts into ``TextFeatures``.

Decoders and encoders of Hugging Face are loaded from a folder, a GGUF file or the hub; of a multimodal model only the
text part is loaded. Layer ``l`` is the output of decoder layer ``l``; the model's last layer is its own
``last_hidden_state``, after the final norm. Layers above the highest one asked for are never built, and the
language-model head is never run.
"""

from __future__ import annotations

import gc
import inspect
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from semantic_routing.common.device import has_bfloat16
from semantic_routing.common.sizes import parse_bytes
from semantic_routing.text.architecture import (
    find_layers,
    has_experts,
    model_config,
    positions,
    shape_of,
    stack_config,
)
from semantic_routing.text.config import TextEncoderConfig, TextShape
from semantic_routing.text.features import TextFeatures
from semantic_routing.text.identity import encoder_identity, machine
from semantic_routing.text.keys import check_keys, read_keys
from semantic_routing.text.source import find_source
from semantic_routing.text.store import DiskStates, States, StateStore, state_key
from semantic_routing.text.taps import recorded
from semantic_routing.text.tokens import PromptTokenizer, check_sizes, load_tokenizer
from semantic_routing.text.weights import load_model

FEW_TOKENS, MANY_TOKENS = 128, 1024
"""Tokens, padding included, of one forward pass: enough for products to be efficient, on a CPU and on a GPU."""
PACKED_TOKENS = 4
"""Packed batches hold a multiple of this number of tokens a prompt, so that compiled graphs see few shapes."""
SMALL = 2**22
"""Parameters up to which a language model reads many tokens at once on a CPU, too: there each call costs most."""
WIDENED = 2**30
"""Parameters up to which a bfloat16 model runs in float32 on a CPU without bfloat16: 2.5 times as fast for SmolLM2, in
twice the memory."""
CPU_MEMORY = 2**30
"""Bytes of states that ``keep="auto"`` keeps on a CPU."""
Row = tuple[int, ...]
"""Token ids of a prompt."""


class TextEncoder:
    """A frozen language model; ``encode`` returns the hidden states of the chosen layers for a batch of prompts.

    encoder = TextEncoder.from_pretrained("Qwen/Qwen3-0.6B")
    features = encoder.encode(["a red circle", ""])  # hidden [L, B, N, C], mask [B, N]
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, config: TextEncoderConfig, shape: TextShape, *, owned: bool = True
    ) -> None:
        """Use ``from_pretrained`` instead. ``model`` holds the layers up to ``shape.layers[-1]`` and no more.

        The weights of an ``owned`` model may change their type (``_compute_dtype``).
        """
        find_layers(model)  # an unknown architecture is an error now rather than at the first prompt
        self.config = config
        self.shape = shape
        self._model: nn.Module | None = model.eval().requires_grad_(False)
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        self._limit = min(config.max_tokens, positions(model) or config.max_tokens)
        self._tokens = PromptTokenizer(tokenizer, config, rows, self._limit)
        self._compiled = False
        parameters = sum(p.numel() for p in model.parameters())
        self._small = parameters <= SMALL
        self._dtype = next(model.parameters()).dtype  # of the states
        rounded = all(p.dtype == torch.bfloat16 for p in model.parameters())
        self._widens = owned and rounded and parameters <= WIDENED
        self._moving = threading.Lock()
        self._reads_on: torch.device | None = None  # with ``offload``, where the weights are not
        disk = None
        if config.keep_on_disk:
            folder = Path(config.keep_on_disk).expanduser() / encoder_identity(model, shape)
            disk = DiskStates(folder, parse_bytes(config.keep_on_disk_bytes))
        self._store = StateStore(self._memory(), disk)

    @classmethod
    def from_pretrained(cls, config: TextEncoderConfig | str | Path, device: torch.device | str = "cpu") -> TextEncoder:
        """Load the text model that ``config``, or just a path or a hub name, describes.

        Raises ValueError if there is no such model, if its weights are incomplete or neither safetensors nor GGUF, or
        if it lacks a layer asked for.
        """
        if not isinstance(config, TextEncoderConfig):
            config = TextEncoderConfig(name_or_path=str(config))
        source = find_source(config.name_or_path)
        whole = model_config(config.name_or_path, source)
        shape = shape_of(config, stack_config(whole))
        tokenizer = load_tokenizer(config, source)
        model = load_model(config, source, whole, keep=shape.layers[-1])
        check_sizes(model, tokenizer, config)
        return cls(model, tokenizer, config, shape).to(device)

    @classmethod
    def from_model(cls, model: nn.Module, tokenizer: Any, config: TextEncoderConfig, total_layers: int) -> TextEncoder:
        """Wrap and freeze a text model of transformers that is already loaded. No hidden states are cached.

        ``total_layers`` is the depth of the language model before any layers were cut off. Raises ValueError if the
        model has fewer layers than ``config`` asks for.
        """
        held = stack_config(model.config)
        shape = shape_of(config, held, total_layers)
        if shape.layers[-1] > held.num_hidden_layers:
            raise ValueError(
                f"layer {shape.layers[-1]} of {config.name_or_path!r} is asked for, but the text encoder holds "
                f"{held.num_hidden_layers} layers"
            )
        return cls(model, tokenizer, replace(config, keep="0", keep_on_disk=""), shape, owned=False)

    @property
    def num_layers(self) -> int:
        """Number L of layers that ``encode`` returns."""
        return len(self.shape.layers)

    @property
    def width(self) -> int:
        """Width C of a hidden state."""
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
        """The model's tokenizer, of transformers."""
        return self._tokens.tokenizer

    @property
    def device(self) -> torch.device:
        """The device on which prompts are encoded and features are returned."""
        device = self._reads_on or next(self.model.parameters()).device
        # Weights that accelerate offloaded layer by layer are on the meta device; its hooks move what they read.
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def disk_is_full(self) -> bool:
        """Whether the folder of ``keep_on_disk`` has stopped to take states."""
        return self._store.disk_is_full

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the weights, for example ``to("cpu")`` to free memory on a GPU, and return the encoder.

        With ``offload`` they stay in main memory until prompts are encoded.
        """
        if self.config.offload:
            self._reads_on = torch.device(device)
        else:
            self.model.to(device=device)
        self._store.memory = self._memory()
        return self

    def compile(self) -> TextEncoder:
        """Compile the layers, with one graph for each length of prompts, and return the encoder.

        It starts more slowly and runs faster. States differ from uncompiled ones by rounding.
        """
        self._compiled = True
        for layer in find_layers(self.model)[0]:
            # The forward and not the module: the hooks that take the states stay outside of the graph.
            layer.forward = torch.compile(layer.forward, dynamic=False)
        return self

    def unload(self) -> None:
        """Free the weights and the cached states. Existing features stay valid; ``encode`` raises RuntimeError."""
        self._model = None
        self._store.clear()
        gc.collect()  # transformers' modules sit in reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()  # not inference_mode: autograd refuses to save its tensors for the router's backward
    def encode(
        self, prompts: Sequence[str], *, with_kv: bool = False, strict: bool = True, packed: bool = False
    ) -> TextFeatures:
        """Return the hidden states of the chosen layers for each prompt: ``hidden`` [L, B, N, C] and ``mask`` [B, N].

        With ``with_kv`` attention keys and values are returned too. With ``packed`` the states have no padding
        (``TextFeatures.positions``), and there are no keys and values.

        A prompt's features are bitwise independent of the rest of its batch and of the cache, because forward passes
        have one shape for each length (``_chunks``). Padding is on the right, masked, and zero. Keys are those that the
        model's attention uses (after its own norm and rotary embedding, before heads are repeated). A prompt without
        any token ("" if the tokenizer adds none) becomes a single token: the one that begins a text, or else the one
        that ends or pads it. This is the null prompt.

        If a prompt does not reach the model, because the tokenizer knows none of its characters or the chat template
        changes it, this is a ValueError, or a warning with ``strict=False``, as in training on captions of any kind.
        """
        if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("encode expects a non-empty list of prompts, such as ['a red circle']")
        if with_kv:
            check_keys(self.model, self.shape, self.config.name_or_path)
        rows = self._tokens(prompts, strict=strict, stacklevel=4)
        found, missing = {}, []
        kept = self._store.active and not isinstance(self.model, FSDPModule)
        keys = {row: self._key(row, with_kv) if kept else "" for row in rows}
        for row, key in keys.items():
            states = self._store.get(key) if kept else None
            if states is None:
                missing.append(row)
            else:
                found[row] = states
        if missing:
            with self._at_hand():
                for chunk in self._chunks(missing):
                    for row, states in zip(chunk, self._forward(chunk, with_kv), strict=False):
                        if kept and row not in found:
                            self._store.put(keys[row], states)
                        found[row] = states
        batch = [found[row] for row in rows]
        return self._packed(batch) if packed else self._batch(batch)

    def position(self, prompt: str, end: int) -> int:
        """Return the position of the token that holds the last character before ``end`` of a prompt.

        Raises ValueError if the tokenizer does not say which characters its tokens hold.
        """
        return self._tokens.position(prompt, end)

    def state_bytes(self, prompts: Sequence[str], *, with_kv: bool = False) -> float:
        """Return the mean number of bytes of a prompt's states, without encoding the prompts."""
        rows = self._tokens(prompts, strict=False)
        width = self.width + (2 * self.shape.kv_heads * self.shape.head_dim if with_kv else 0)
        return sum(map(len, rows)) / len(rows) * self.num_layers * width * self._dtype.itemsize

    def _chunks(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Yield the prompts of each forward pass: those of one bucket, the last chunk filled up with its last prompt.

        The order of a product's sums follows from its shape, so one shape for each bucket makes a prompt's states the
        same in every batch. Mixture-of-experts models have products of varying shapes, so their prompts are encoded one
        at a time. Sharded weights need the same number of forward passes on every process, so there all prompts are
        encoded at once.
        """
        if isinstance(self.model, FSDPModule):
            yield [*rows]
            return
        tokens = MANY_TOKENS if self._small or self.device.type != "cpu" else FEW_TOKENS
        groups: dict[int, list[Row]] = {}
        for row in rows:
            groups.setdefault(self._bucket(len(row)), []).append(row)
        for bucket, group in groups.items():
            size = 1 if has_experts(self.model) else max(1, tokens // bucket)
            for start in range(0, len(group), size):
                chunk = group[start : start + size]
                yield chunk + chunk[-1:] * (size - len(chunk))

    def _forward(self, rows: Sequence[Row], with_kv: bool) -> Iterator[States]:
        """Run the model on prompts and yield their states."""
        ids, mask = (x.to(self.device) for x in self._padded(rows))
        layers, is_decoder = find_layers(self.model)
        options: dict[str, Any] = {"use_cache": with_kv} if is_decoder else {}
        if with_kv:
            from transformers import DynamicCache

            options["past_key_values"] = DynamicCache()  # given no config, so sliding layers keep all tokens
        options = {k: v for k, v in options.items() if k in inspect.signature(self.model.forward).parameters}
        # A caller's autocast would change the states from run to run of different settings.
        with torch.autocast(self.device.type, enabled=False), recorded(layers) as outputs:
            last = self.model(input_ids=ids, attention_mask=mask.long(), **options).last_hidden_state
        whole = len(layers) == self.shape.total_layers
        taken: list[Any] = [
            last if whole and i == len(layers) else outputs.get(layers[i - 1]) for i in self.shape.layers
        ]
        if any(getattr(state, "shape", None) != (*ids.shape, self.shape.width) for state in taken):
            raise ValueError(
                f"{type(self.model).__name__} is not a supported text encoder: a layer's output is not a single hidden "
                "state"
            )
        hidden = torch.stack(taken).to(self._dtype)
        keys = values = None
        if with_kv:
            pair = read_keys(options.get("past_key_values"), self.shape.layers, self.config.name_or_path)
            keys, values = (x.to(self._dtype) for x in pair)
        for i, n in enumerate(map(len, rows)):
            own = (None, None) if keys is None or values is None else (keys[:, i, :, :n], values[:, i, :, :n])
            yield States(hidden[:, i, :n], *own)

    def _batch(self, found: Sequence[States]) -> TextFeatures:
        """Return the states of prompts as one batch, padded with zeros to the bucket of the longest prompt."""
        mask = self._mask(found)
        length = mask.shape[1]

        def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
            if parts[0] is None:
                return None
            layers, *heads, _, width = parts[0].shape
            out = torch.zeros(layers, len(parts), *heads, length, width, dtype=parts[0].dtype, device=self.device)
            for i, part in enumerate(parts):
                assert part is not None
                out[:, i, ..., : part.shape[-2], :] = part
            return out

        hidden, keys, values = (joined(parts) for parts in zip(*found, strict=True))
        assert hidden is not None
        return TextFeatures(hidden, mask.to(self.device), keys, values)

    def _packed(self, found: Sequence[States]) -> TextFeatures:
        """Return prompts' states without padding, filled up so that most batches of one size have the same T."""
        mask = self._mask(found)
        positions = mask.flatten().nonzero()[:, 0]
        tokens, multiple = len(positions), PACKED_TOKENS * len(found)
        positions = F.pad(positions, (0, -tokens % multiple), value=mask.numel())
        first = found[0].hidden
        hidden = first.new_empty(len(first), 1, len(positions), self.width)
        hidden[:, :, tokens:] = 0
        torch.cat([states.hidden for states in found], dim=1, out=hidden[:, 0, :tokens])
        device = self.device
        return TextFeatures(hidden.to(device), mask.to(device), positions=positions.to(device))

    def _mask(self, found: Sequence[States]) -> Bool[Tensor, "B N"]:
        """Return the mask of prompts that are padded to the bucket of the longest prompt."""
        lengths = torch.tensor([states.hidden.shape[1] for states in found])
        return torch.arange(self._bucket(int(lengths.max()))) < lengths[:, None]

    def _key(self, row: Row, with_kv: bool) -> str:
        dtype = self._compute_dtype
        widened = () if dtype == self._dtype else (str(dtype),)
        return state_key(row, self._bucket(len(row)), with_kv, self._compiled, *machine(self.device), *widened)

    @property
    def _compute_dtype(self) -> torch.dtype:
        """The type of the weights while prompts are encoded: float32 for bfloat16 weights where that is faster.

        States have the type of the weights as they were loaded.
        """
        slow = self._widens and not isinstance(self.model, FSDPModule) and not has_bfloat16(self.device)
        return torch.float32 if slow else self._dtype

    def _memory(self) -> int:
        """Return the most bytes of states to keep in main memory."""
        if self.config.keep != "auto":
            return parse_bytes(self.config.keep)
        return CPU_MEMORY if self.device.type == "cpu" else 0

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Hold weights that ``offload`` keeps in main memory on the device while the context lasts."""
        if self._widens:
            dtype = self._compute_dtype
            with self._moving:
                for p in self.model.parameters():
                    p.data = p.data.to(dtype)
        if self._reads_on is None:
            yield
            return
        with self._moving:  # no other thread takes the weights away meanwhile
            self.model.to(self._reads_on)
            try:
                yield
            finally:
                self.model.to("cpu")

    def _padded(self, rows: Sequence[Row]) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """Return token ids padded on the right to a bucket, and the mask of real tokens."""
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(self._bucket(int(lengths.max()))) < lengths[:, None]
        ids = torch.full(mask.shape, self._tokens.pad)
        ids[mask] = torch.tensor([token for row in rows for token in row])
        return ids, mask

    def _bucket(self, length: int) -> int:
        """Return the smallest bucket that holds ``length`` tokens, at most the limit."""
        index = bisect_left(self.config.buckets, length)
        bucket = self.config.buckets[index] if index < len(self.config.buckets) else self._limit
        return min(bucket, self._limit)
