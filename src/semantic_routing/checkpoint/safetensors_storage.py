"""Plain safetensors files as storage of ``torch.distributed.checkpoint``, whose own storage pickles its metadata.

A state is a dictionary of files, and each file a dictionary of tensors. One process writes ``model.safetensors``. Of N
processes each writes its shards to ``model-00001-of-0000N.safetensors``, whose header gives their offsets in the full
tensors, in the format of torch's ``HuggingFaceStorageReader``. Files that any number of processes wrote can be read by
any other number: each process reads the slices it needs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, Metadata, SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from semantic_routing.common.files import as_umask_says, flush

SUFFIX = ".safetensors"
PLACES, OFFSET, SHAPE = "DCP_SHARDING_INFO", "saved_offsets", "shape"
"""Keys in a part's header: for every tensor its offsets in the full tensor, and the full tensor's shape."""


def part_name(file: str, part: int, parts: int) -> str:
    """Return the name of one process's part (from 1) of a file such as "model"."""
    return f"{file}{SUFFIX}" if parts == 1 else f"{file}-{part:05d}-of-{parts:05d}{SUFFIX}"


def parts_of(path: Path) -> list[Path]:
    """List the files that make up ``path``, such as ``model.safetensors``: itself or its parts."""
    return [path] if path.exists() else sorted(path.parent.glob(f"{path.stem}-*-of-*{SUFFIX}"))


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raise ValueError if it is missing, damaged or not as long as its header says."""
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def alone() -> None:
    """Silence torch's warning about running without torch.distributed."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit", UserWarning)


class SafetensorsWriter(StorageWriter):
    """Writes a state into a folder. Subclasses add what the first process does before and after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self) -> None:
        """Make the folder; called on the first process before any process writes."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def end(self, files: list[str]) -> None:
        """Finish the folder of ``files``; called on the first process after all processes have written."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: the writer has no state."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: nothing is needed before the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return a process's plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Begin and number the parts; called on the first process."""
        self.begin()
        return [replace(plan, storage_data=(i, len(plans))) for i, plan in enumerate(plans, 1)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's part of every file."""
        tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
        places: dict[str, dict[str, dict[str, list[int]]]] = defaultdict(dict)
        for item in plan.items:
            piece = planner.resolve_data(item)
            if not isinstance(piece, Tensor) or item.tensor_data is None or item.index.offset is None:
                raise TypeError(f"{item.index.fqn} is not a tensor; only tensors can be written")
            file, _, name = item.index.fqn.partition(".")
            if piece.numel() or not item.tensor_data.size.numel():  # some processes have no shard of a small tensor
                tensors[file][name] = piece.detach().contiguous()
                places[file][name] = {OFFSET: list(item.index.offset), SHAPE: list(item.tensor_data.size)}
        part, parts = plan.storage_data
        done: Future[list[WriteResult]] = Future()
        results = []
        for file, pieces in tensors.items():
            path = self.folder / part_name(file, part, parts)
            _write(path, pieces, {PLACES: json.dumps(places[file])} if parts > 1 else None)
            results.append(WriteResult(MetadataIndex(path.name), path.stat().st_size, None))
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """End; called on the first process when all have written."""
        self.end(sorted(result.index.fqn for part in results for result in part))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: folders are given to the constructor instead."""
        return False


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None) -> None:
    try:
        save_file(tensors, path, header)
        as_umask_says(path, [path])
        flush(path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise ValueError(f"{path.name}: {getattr(error, 'strerror', None) or error}") from error


class SafetensorsReader(StorageReader):
    """Reads the named files of a folder, single or in parts."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        """Raise ValueError if a file is missing or damaged, or if its parts do not make up the full tensors."""
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
        self._pieces: dict[tuple[str, torch.Size], tuple[Path, str]] = {}
        self._types: dict[str, torch.dtype] = {}
        for file in files:
            whole = folder / f"{file}{SUFFIX}"
            for path in parts_of(whole) or [whole]:
                self._add(file, path)
            for name, shape in self.shapes.items():
                if sum(prod(chunk.sizes) for chunk in self._chunks[name]) != shape.numel():
                    raise ValueError(f"{whole} lacks parts of {name}: one of its files is missing")

    def _add(self, file: str, path: Path) -> None:
        with open_tensors(path) as tensors:
            places = json.loads((tensors.metadata() or {}).get(PLACES, "{}"))
            names = tensors.keys()
            for name in names:
                key, held = f"{file}.{name}", tensors.get_slice(name)
                sizes = torch.Size(held.get_shape())
                place = places.get(name, {})
                offset = torch.Size(place.get(OFFSET, [0] * len(sizes)))
                self.shapes[key] = torch.Size(place.get(SHAPE, sizes))
                self._chunks[key].append(ChunkStorageMetadata(offset, sizes))
                self._pieces[key, offset] = (path, name)
                self._types[key] = TYPES[held.get_dtype()]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Read the full tensors whose names, such as "model.proj_out.weight", begin with ``prefix``."""
        found = {
            name: torch.empty(shape, dtype=self._types[name])
            for name, shape in self.shapes.items()
            if name.startswith(prefix)
        }
        alone()
        dcp.load(found, storage_reader=self, no_dist=True)
        return found

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: the reader has no state."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return types, shapes and shards of all tensors, as the files' headers give them."""
        return Metadata(
            {
                name: TensorStorageMetadata(TensorProperties(self._types[name]), shape, self._chunks[name])
                for name, shape in self.shapes.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the constructor has read the headers."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return a process's plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return all processes' plans unchanged: each reads what it needs."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy the slices that this process needs into its tensors."""
        wanted: dict[Path, list[tuple[str, Any]]] = defaultdict(list)
        for item in plan.items:
            assert item.storage_index.offset is not None
            path, name = self._pieces[item.storage_index.fqn, item.storage_index.offset]
            wanted[path].append((name, item))
        for path, items in wanted.items():
            with open_tensors(path) as tensors:
                for name, item in items:
                    spans = zip(item.storage_offsets, item.lengths, strict=True)
                    held = tensors.get_slice(name)[tuple(slice(at, at + length) for at, length in spans)]
                    target = planner.resolve_tensor(item)
                    target.detach().copy_(held)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: folders are given to the constructor instead."""
        return False


TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The tensor types of a run, by safetensors' names."""
