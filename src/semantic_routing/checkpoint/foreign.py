"""Weights of other programs: safetensors or torch files, single or sharded, read one tensor at a time.

Torch files are opened with ``weights_only``, so a file that would run code is refused.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WRAPPERS = ("module.", "_orig_mod.", "model.", "transformer.", "dit.")
"""Prefixes of all names, added by DistributedDataParallel, torch.compile, trainers and pipelines."""
LAYOUTS = (
    "*.safetensors.index.json",
    "model.safetensors",
    "*.safetensors",
    "*.bin.index.json",
    "*pytorch_model.bin",
    "mp_rank_00_model_states.pt",  # DeepSpeed
    "global_step*/mp_rank_00_model_states.pt",
    "pytorch_model/mp_rank_00_model_states.pt",  # Accelerate around DeepSpeed
)
"""Patterns of the weights in a checkpoint's folder; the first one with a match is read."""
DAMAGED = (RuntimeError, EOFError, LookupError, TypeError, AttributeError, ValueError, AssertionError)
"""Errors that torch.load raises for damaged files."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read from its file when it is accessed."""

    def __init__(self, read: Callable[[str], Tensor], names: Mapping[str, str]) -> None:
        """``names`` maps the names of this mapping to the names that ``read`` takes."""
        self._read = read
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # Mapping's own method would read the tensor


def unwrapped(source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove prefixes of ``WRAPPERS`` that all names share."""
    for prefix in WRAPPERS:
        if source and all(name.startswith(prefix) for name in source):
            return unwrapped(renamed(source, prefix))
    return source


def renamed(source: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    """Select the tensors whose names begin with ``prefix``, and remove it."""
    names = {name.removeprefix(prefix): name for name in source if name.startswith(prefix)}
    return LazyTensors(source.__getitem__, names)


def read_upstream(src: Path) -> LazyTensors:
    """Open the tensors of a checkpoint's file or folder; each is read when it is accessed.

    Raises ValueError if there is no checkpoint, if a file is damaged or lacks tensors of its index, or if a torch file
    holds more than tensors and plain values. Nothing in such a file is run.
    """
    if src.is_dir():
        found = next(filter(None, (sorted(src.glob(layout)) for layout in LAYOUTS)), [])
        if len(found) != 1:
            names = [str(path.relative_to(src)) for path in found]
            what = f"several files: name one of {names}" if found else "no weights"
            raise ValueError(f"{src} holds {what}; a checkpoint's folder has one of {', '.join(LAYOUTS)}")
        return read_upstream(found[0])
    return _read_shards(src) if src.is_file() and src.name.endswith(".index.json") else _read_file(src)


def _read_shards(index: Path) -> LazyTensors:
    """Open all files that an index names; they are in its folder."""
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(places.values()))
        elsewhere = [file for file in files if Path(file).name != file]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index} is not the index of a sharded checkpoint; download it again") from error
    if elsewhere:
        raise ValueError(f"{index} names {elsewhere[0]!r}, which is not a file beside it")
    shards = {file: _read_file(index.parent / file) for file in files}
    held = {(name, file) for file, shard in shards.items() for name in shard}
    odd = {name for name, _ in held ^ set(places.items())}
    raise_if_any({"named by only one of index and files": odd}, f"as {index} describes it")
    return LazyTensors(lambda name: shards[places[name]][name], {name: name for name in places})


def _read_file(path: Path) -> LazyTensors:
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_safetensors(path: Path) -> LazyTensors:
    # Opened again for every tensor, because pages that were read stay in memory while the file is open.
    def read(name: str) -> Tensor:
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated, damaged or not a safetensors file: {error}") from error
    return LazyTensors(read, {name: name for name in names})


def _read_torch(path: Path) -> LazyTensors:
    # Opened again after every 32nd part, for the same reason; opening for every tensor would take too long.
    weights = _open_torch(path)
    part = unread = path.stat().st_size // 32

    def read(name: str) -> Tensor:
        nonlocal weights, unread
        if unread <= 0:
            weights, unread = _open_torch(path), part
        unread -= weights[name].nbytes
        return weights[name]

    return LazyTensors(read, {name: name for name in weights})


def _open_torch(path: Path) -> Mapping[str, Tensor]:
    """Open the state dict of a torch file, memory-mapped."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain values, and reading it could run code; "
            "save its weights as safetensors"
        ) from error
    except DAMAGED as error:
        raise ValueError(f"{path} is truncated, damaged or not written by a recent torch.save") from error
    if isinstance(content, Mapping):
        content = content.get("module", content)  # where DeepSpeed keeps the weights
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in content.items()
    ):
        raise ValueError(f"{path} holds no state dict, neither by itself nor under 'module'")
    return content


def raise_if_any(problems: Mapping[str, Iterable[str]], what: str) -> None:
    """Raise ValueError that lists the tensors under each problem, if there are any."""
    lists = []
    for problem, found in problems.items():
        if names := sorted(found):
            rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lists.append(f"{len(names)} tensors {problem} ({', '.join(names[:4])}{rest})")
    if lists:
        raise ValueError(f"the checkpoint is not {what}: {'; '.join(lists)}")
