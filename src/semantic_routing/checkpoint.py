"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

A run's folder holds ``checkpoints/step-0001000/`` with the weights, their moving average, the optimisers' state, the
random generators' and ``state.json``; several processes write their parts of each file (``storage.py``). A checkpoint
is copied to host memory in the step and written on a thread, under a temporary name, flushed to disk and renamed when
all processes have done so: whatever bears a checkpoint's name was complete. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from semantic_routing.storage import (
    SUFFIX,
    SafetensorsReader,
    SafetensorsWriter,
    alone,
    as_umask_says,
    flush,
    open_tensors,
)

MODEL, EMA, OPTIMIZER, RANDOM = (f"{name}{SUFFIX}" for name in ("model", "ema", "optimizer", "random"))
STATE = "state.json"
PARTIAL = ".partial-"
NAME = re.compile(r"step-(\d{7,})")
"""The name of a checkpoint ..."""
REMNANT = re.compile(rf"\.{NAME.pattern}{re.escape(PARTIAL)}\w+")
"""... and of one that is being written or deleted."""
FILES = re.compile(rf"{re.escape(STATE)}|(model|ema|optimizer|random)(-\d{{5}}-of-\d{{5}})?{re.escape(SUFFIX)}")
"""What is in it. Nothing else is ever deleted: people keep copies and notes beside and among these files."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write a file or a folder to; flushed and renamed when all went well.

    An existing file is replaced, a folder only if it is empty. Raises ValueError where the place cannot be written.
    """
    scratch = path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(4)}")  # no other process has the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        items = [*scratch.rglob("*"), scratch] if scratch.is_dir() else [scratch]
        as_umask_says(scratch, [item for item in items if item.is_file()])
        for item in items:
            flush(item)
        scratch.replace(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        _remove(scratch)


def check_writable(folder: Path) -> None:
    """ValueError where ``folder`` cannot be made or written to: better before hours of work than after."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {folder}: no permission to write in {there}")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


class Saver:
    """Writes a run's checkpoints behind the training's back, one at a time."""

    def __init__(self, run: Path, *, keep: int = 1, keep_every: int = 0, group: ProcessGroup | None = None) -> None:
        """``group`` is gloo's and nobody else's: its processes meet on threads. None where one process is alone.

        The latest ``keep`` checkpoints are kept, and for good those of every ``keep_every``-th step, if above 0.
        """
        self.run, self.keep, self.keep_every, self.group = run, keep, keep_every, group
        self.rank = 0 if group is None else group.rank()
        self._writing: Future[Any] | None = None
        self._folder = run

    @property
    def failed(self) -> bool:
        """Whether the writing begun last has come to nothing; ``wait`` raises why."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def save(
        self,
        step: int,
        model: nn.Module,
        ema: dict[str, Tensor],
        optimizers: list[Optimizer],
        state: dict[str, Any],
    ) -> Path:
        """Copy the state of ``step`` finished steps and begin to write it; returns the folder it will be in.

        Every process must call it. Waits first for the checkpoint before, and raises its ValueError.
        """
        self.wait()
        folder = self._folder = self.run / "checkpoints" / f"step-{step:07d}"
        scratch = _scratch(folder)

        def begin() -> None:
            _remove(scratch)
            scratch.mkdir(parents=True)

        def end(files: list[str]) -> None:
            whole = json.dumps({"step": step} | state | {"files": files}, indent=2)
            (scratch / STATE).write_text(whole + "\n", encoding="utf-8")
            flush(scratch / STATE)
            flush(scratch)
            _replace(folder, scratch)
            prune(self.run, self.keep, self.keep_every, last=step)

        tensors = {
            "model": model.state_dict(),
            "ema": ema,
            "optimizer": optimizer_tensors(model, optimizers),
            "random": random_state(self.rank),
        }
        if self.group is None:
            alone()
        writing = dcp.async_save(
            tensors,
            storage_writer=SafetensorsWriter(scratch, begin, end),
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(writing, Future)  # the other kind comes of stagers that copy on a thread
        self._writing = writing
        return folder

    def wait(self) -> None:
        """Return when nothing is being written; ValueError where that failed, here or on another process."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except CheckpointException as error:
            if self.rank == 0:
                _remove(_scratch(self._folder))  # it may be what filled the disk
            for reason, _ in error.failures.values():
                if isinstance(reason, OSError | ValueError):
                    what = getattr(reason, "strerror", None) or reason
                    raise ValueError(f"cannot write {self._folder}: {what}") from error
            raise

    def close(self) -> None:
        """Let what is being written come to its end, whatever that is: something else ends the run already."""
        if self._writing is not None:
            wait([self._writing])


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[Optimizer],
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of ``step`` finished steps of one process; returns its folder."""
    saver = Saver(run, keep=sys.maxsize)
    folder = saver.save(step, model, ema, optimizers, state)
    saver.wait()
    return folder


def load_training_state(
    folder: Path, model: nn.Module, optimizers: list[Optimizer], group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Fill model, optimisers and, where this rank wrote them, random generators; returns the moving average.

    The average is in the order of the model's parameters. Raises ValueError for what is missing, damaged or of
    another model.
    """
    read_state(folder)
    reader = SafetensorsReader(folder, [Path(name).stem for name in (MODEL, EMA, OPTIMIZER, RANDOM)])
    parameters, rank = dict(model.named_parameters()), 0 if group is None else group.rank()
    weights = model.state_dict()
    _check_same(folder / MODEL, _below(reader.shapes, "model."), {k: v.shape for k, v in weights.items()})
    _check_same(folder / EMA, _below(reader.shapes, "ema."), {k: p.shape for k, p in parameters.items()})
    ema = {name: torch.empty_like(p, requires_grad=False) for name, p in parameters.items()}
    slots = {}
    for key, shape in _below(reader.shapes, "optimizer.").items():
        p = parameters.get(key.rpartition("/")[0])
        if p is None or shape not in (torch.Size(), p.shape):
            raise ValueError(f"{folder / OPTIMIZER} belongs to another model: {key} {tuple(shape)}")
        slots[key] = torch.empty_like(p, requires_grad=False) if shape else torch.empty((), device=p.device)
    generators = {name: x for name, x in random_state(rank).items() if f"random.{name}" in reader.shapes}
    state = {"model": weights, "ema": ema, "optimizer": slots, "random": generators}
    if group is None:
        alone()
    dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    owners = {id(p): o for o in optimizers for group_ in o.param_groups for p in group_["params"]}
    for key, tensor in slots.items():
        name, _, slot = key.rpartition("/")
        owners[id(parameters[name])].state[parameters[name]][slot] = tensor
    set_random_state(generators)
    return ema


def random_state(rank: int) -> dict[str, Tensor]:
    """The state of this process's random generators. Nothing here draws from them, but what a user adds may."""
    state = {f"{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """What ``random_state`` gave."""
    for name, tensor in state.items():
        (torch.cuda.set_rng_state if name.endswith(".cuda") else torch.set_rng_state)(tensor)


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill a model strictly from a file such as ``ema.safetensors`` or its parts; ValueError lists what does not match.

    A model on the meta device takes the file's tensors as they are, so nothing is held twice.
    """
    tensors = read_tensors(path)
    _check_same(path, {k: x.shape for k, x in tensors.items()}, {k: x.shape for k, x in model.state_dict().items()})
    model.load_state_dict(tensors, assign=any(p.is_meta for p in model.parameters()))


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file such as ``model.safetensors`` or of its parts, or those whose names begin with ``prefix``.

    ValueError if it is missing or damaged.
    """
    if path.is_file() and not prefix:
        with open_tensors(path):
            return load_file(path)
    found = SafetensorsReader(path.parent, [path.stem]).tensors(f"{path.stem}.{prefix}")
    return _below(found, f"{path.stem}.")


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint: ``step``, and ``config``, the run's resolved configuration."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is not a checkpoint: its {STATE} cannot be read") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{folder} was not written by semroute train: its {STATE} tells no step")
    return state


def check_whole(folder: Path) -> None:
    """ValueError where a checkpoint lacks a file or has one that is damaged; reads no more than the files' headers."""
    listed = read_state(folder).get("files", [])
    for path in sorted({*(folder / name for name in listed), *folder.glob(f"*{SUFFIX}")}):
        with open_tensors(path):
            pass


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first; what was never finished has another name."""
    return sorted((f for f in (run / "checkpoints").glob("step-*") if NAME.fullmatch(f.name)), key=_step)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest whole one of a run's folder.

    Damaged ones are passed over, and a line on stderr says so. ValueError if there is none.
    """
    if (path / STATE).is_file():
        return path
    found, first = checkpoints(path), None
    for folder in reversed(found):
        try:
            check_whole(folder)
        except ValueError as error:
            first = first or error
            continue
        if first is not None:
            sys.stderr.write(f"semroute: {first}; going on from {folder}\n")
        return folder
    if first is not None:
        raise ValueError(f"no whole checkpoint at {path}: {first}")
    hint = "it does not exist" if not path.exists() else "it holds no checkpoints/step-* folder"
    raise ValueError(f"no checkpoint at {path}: {hint}; give a run's folder or one of its checkpoints")


def prune(run: Path, keep: int, keep_every: int = 0, *, last: int | None = None) -> None:
    """Delete all but the latest ``keep`` checkpoints of a run, and what killed processes left half-written.

    Nothing goes that a run has not written: neither what has another name, nor a checkpoint with anything else in it.

    Those of every ``keep_every``-th step stay, if it is above 0, and those after step ``last``: where a damaged one was
    passed over, the run comes by there again and replaces it.
    """
    found = [folder for folder in checkpoints(run) if last is None or _step(folder) <= last]
    old = [folder for folder in found[:-keep] if not keep_every or _step(folder) % keep_every]
    left = [path for path in (run / "checkpoints").glob(f".step-*{PARTIAL}*") if REMNANT.fullmatch(path.name)]
    for folder in [*old, *left]:
        if _is_own(folder):
            _remove(folder)


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Every optimiser's state under ``parameter/slot``."""
    states = {id(p): state for o in optimizers for p, state in o.state.items()}
    return {
        f"{name}/{slot}": torch.as_tensor(value).detach()
        for name, p in model.named_parameters()
        for slot, value in states.get(id(p), {}).items()
    }


def _check_same(path: Path, found: Mapping[str, torch.Size], own: Mapping[str, torch.Size]) -> None:
    """ValueError lists what of a file's names and shapes are not a model's own."""
    wrong = [f"{k}: {tuple(found[k])} in the file, {tuple(own[k])} in the model"
             for k in own.keys() & found.keys() if own[k] != found[k]]  # fmt: skip
    wrong += [f"{k}: not in the file" for k in own.keys() - found.keys()]
    wrong += [f"{k}: not in the model" for k in found.keys() - own.keys()]
    if wrong:
        raise ValueError(f"{path} belongs to another model: {'; '.join(sorted(wrong)[:4])} ({len(wrong)} in all)")


def _below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _step(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def _is_own(folder: Path) -> bool:
    """Whether a folder holds what a run writes into a checkpoint, and nothing else."""
    return folder.is_dir() and not folder.is_symlink() and all(FILES.fullmatch(path.name) for path in folder.iterdir())


def _scratch(folder: Path) -> Path:
    """Where a checkpoint is while it is being written: one name for all processes."""
    return folder.with_name(f".{folder.name}{PARTIAL}0")


def _replace(folder: Path, scratch: Path) -> None:
    """Give a checkpoint its name; one in the way goes only when the new one stands in its place.

    Where a user keeps something in that one, it stays under another name.
    """
    old = folder.with_name(f".{folder.name}{PARTIAL}old")
    if folder.exists():
        if not _is_own(folder):
            old = folder.with_name(f"{folder.name}-replaced-{secrets.token_hex(4)}")
        elif old.exists():
            _remove(old)
        folder.rename(old)
    scratch.rename(folder)
    flush(folder.parent)
    if old.name.startswith("."):
        _remove(old)


def _remove(path: Path) -> None:
    """Delete what this program has written itself."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
