"""The settings of a text encoder, and the sizes of its features."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from semantic_routing.common.sizes import parse_bytes


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """The language model that encodes prompts, which of its layers are used, and how prompts are prepared."""

    name_or_path: str
    """A folder written by ``save_pretrained`` (safetensors), a GGUF file or a folder with one, a name on the Hugging
    Face hub, NAME:FILE.gguf for a GGUF file there, or "smollm2"."""
    layers: str | tuple[int, ...] = "all"
    """Layers to use, counted from 1: "all", a range "6..29" (both ends included), or a list "9,18,27"."""
    max_tokens: int = 512
    """Maximum length of a prompt in tokens; longer prompts are cut, with a warning."""
    buckets: tuple[int, ...] = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    """A prompt is padded to the smallest of these lengths that holds it, so that few different shapes occur."""
    prefix: str = ""
    """Instruction put before every prompt, including the empty one, such as "Describe this image. "."""
    chat_template: bool = False
    """Wrap prefix and prompt as a user's message in the model's own chat template."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Floating-point type of weights and hidden states; "auto" is the type of the stored weights, and float32 for GGUF
    files. On a CPU without bfloat16, bfloat16 models of up to a billion parameters compute in float32, in twice the
    memory, and their states are rounded."""
    offload: bool = False
    """Keep the weights in main memory and move them to the device only while prompts are encoded."""
    keep: str = "auto"
    """Main memory for caching hidden states, such as "2GiB"; "0" turns the cache off, and "auto" is 1GiB on a CPU and 0
    on a GPU."""
    keep_on_disk: str = ""
    """Folder in which hidden states are cached for later runs and other processes; none by default."""
    keep_on_disk_bytes: str = "50GiB"
    """Maximum size of each text encoder's states in that folder; once it is reached, nothing more is added."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if not self.buckets or list(self.buckets) != sorted(set(self.buckets)) or self.buckets[0] < 1:
            raise ValueError(f"buckets {self.buckets} must be positive lengths in increasing order")
        parse_bytes("0" if self.keep == "auto" else self.keep)
        parse_bytes(self.keep_on_disk_bytes)


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """Sizes of the features that an encoder returns, as the model's configuration gives them."""

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
    """Return the layers that "all", "6..29", "9,18,27" or a list of numbers selects in a model of ``total`` layers.

    Raises ValueError unless they are strictly increasing and from 1 to ``total``.
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


TINY = "tiny"
"""The text encoder that a run trains for itself (``training/tiny_lm.py``); "tiny:4x64" has 4 layers of width 64."""


def tiny_sizes(name: str) -> dict[str, Any] | None:
    """Read the arguments of ``tiny_lm`` from "tiny", "tiny:LAYERSxWIDTH" or "tiny:LAYERSxWIDTHxSTEPS".

    None for the name of another text encoder.
    """
    found = re.fullmatch(rf"{TINY}(?::(\d+)x(\d+)(?:x(\d+))?)?", name)
    if found is None:
        return None
    return {key: int(size) for key, size in zip(("layers", "width", "steps"), found.groups(), strict=True) if size}
