"""The header of a GGUF file, and copies of the file without the vocabulary and the tensors that are not needed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file holds only data; nothing in it is run. The
readers that transformers uses spend seconds on the vocabulary's strings; a copy without them opens at once.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semantic_routing.common.extras import require

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Struct formats of a value's types."""
UINT32, STRING, ARRAY = 4, 8, 9
TOKENS = "tokenizer.ggml.tokens"
VOCABULARY = (TOKENS, "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.ggml.token_type")


@dataclass(frozen=True)
class Entry:
    """One key of the metadata: its bytes in the file, and its value (of an array the length)."""

    raw: bytes
    value: Any


@dataclass(frozen=True)
class Stored:
    """One tensor: its name, its dimensions (fastest first), its type's number, and its bytes in the file."""

    name: str
    dims: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """Metadata and tensors of a GGUF file."""

    path: Path
    metadata: dict[str, Entry]
    tensors: tuple[Stored, ...]
    alignment: int

    @property
    def architecture(self) -> str:
        """Llama.cpp's name of the architecture."""
        return self.metadata["general.architecture"].value

    def copy(self, path: Path, wanted: Callable[[str], bool], *, data: bool) -> None:
        """Write a copy without the vocabulary, with the tensors whose name is ``wanted``, or only their names.

        The tokens are replaced by their number.
        """
        count = self.metadata[TOKENS].value
        entries = [e.raw for key, e in self.metadata.items() if key not in VOCABULARY]
        numbers = {TOKENS: count, f"{self.architecture}.vocab_size": count}
        entries += [
            _string(key) + struct.pack("<II", UINT32, value)
            for key, value in numbers.items()
            if key in VOCABULARY or key not in self.metadata
        ]
        chosen = [t for t in self.tensors if wanted(t.name)]
        infos, offset = [], 0
        for t in chosen:
            dims, kind, size = (t.dims, t.kind, t.size) if data else ((1,), 0, 4)
            infos.append(_string(t.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
            offset += _aligned(size, self.alignment)
        head = b"".join([MAGIC, struct.pack("<IQQ", 3, len(infos), len(entries)), *entries, *infos])
        with path.open("wb") as out, self.path.open("rb") as file:
            out.write(head.ljust(_aligned(len(head), self.alignment), b"\0"))
            for t in chosen:
                file.seek(t.start)
                body = file.read(t.size) if data else b"\0" * 4
                out.write(body.ljust(_aligned(len(body), self.alignment), b"\0"))


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


class _Cursor:
    """A position in a mapped file; reading beyond the end raises struct.error."""

    def __init__(self, blob: mmap.mmap) -> None:
        self.blob, self.at = blob, 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{form}", self.blob, self.at)
        self.at += struct.calcsize(f"<{form}")
        return found

    def skip_string(self) -> None:
        (length,) = self.numbers("Q")
        self.at += length
        if self.at > len(self.blob):
            raise struct.error

    def string(self) -> str:
        start = self.at + 8
        self.skip_string()
        return self.blob[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.numbers(SCALARS[kind])[0]
        inner, length = self.numbers("IQ")
        if inner == STRING:
            for _ in range(length):
                self.skip_string()
        else:
            self.at += length * struct.calcsize(SCALARS[inner])
        return length


def read_header(path: Path) -> Header:
    """Read a GGUF file's metadata and table of tensors; ValueError if it is not one, truncated, or has no tokenizer."""
    require("gguf", what=f"the GGUF file {path}", extra="gguf")
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError(f"{path} is not a GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                header = _parse(path, _Cursor(blob))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except struct.error as error:
        raise ValueError(f"{path} is truncated: download it again") from error
    except (KeyError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read; download it again") from error
    if TOKENS not in header.metadata:
        raise ValueError(f"{path} has no tokenizer: use a GGUF file of a whole language model")
    return header


def _parse(path: Path, cursor: _Cursor) -> Header:
    cursor.at = len(MAGIC)
    version, tensors, keys = cursor.numbers("IQQ")
    if version not in VERSIONS:
        raise ValueError(f"{path} has version {version} of the GGUF format; expected 2 or 3, little-endian")
    metadata: dict[str, Entry] = {}
    for _ in range(keys):
        start = cursor.at
        key = cursor.string()
        value = cursor.value(*cursor.numbers("I"))
        metadata[key] = Entry(b"" if key in VOCABULARY else cursor.blob[start : cursor.at], value)
    table = [(cursor.string(), cursor.numbers(f"{cursor.numbers('I')[0]}Q"), *cursor.numbers("IQ"))
             for _ in range(tensors)]  # fmt: skip
    metadata["general.architecture"]  # KeyError: damaged
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
    begin = _aligned(cursor.at, alignment)
    stored = tuple(
        Stored(name, dims, kind, begin + offset, _size(path, dims, kind)) for name, dims, kind, offset in table
    )
    if any(t.start + t.size > len(cursor.blob) for t in stored):
        raise struct.error
    return Header(path, metadata, stored, alignment)


def _size(path: Path, dims: tuple[int, ...], kind: int) -> int:
    """Return the bytes of a tensor; ValueError for a type of numbers that the package ``gguf`` does not know."""
    from math import prod

    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} holds tensors of type {kind}, which the installed gguf does not know") from error
    return prod(dims) // block * size
