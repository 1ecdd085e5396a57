"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

A run's folder holds ``checkpoints/step-0001000/`` with the weights, their moving average, the optimisers' state
and ``state.json``. A checkpoint is written under a temporary name, flushed to disk and renamed, so whatever bears
a checkpoint's name is complete. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

MODEL, EMA, OPTIMIZER, STATE = "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
PARTIAL = ".partial-"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write a file or a folder to; flushed and renamed when all went well.

    An existing ``path`` is replaced. Raises ValueError where the place cannot be written.
    """
    scratch = path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(scratch)
        yield scratch
        for item in [*scratch.rglob("*"), scratch] if scratch.is_dir() else [scratch]:
            _flush(item)
        if path.is_dir():
            _remove(path)
        scratch.replace(path)
        _flush(path.parent)
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


def save_checkpoint(
    run: Path,
    step: int,
    model: nn.Module,
    ema: dict[str, Tensor],
    optimizers: list[Optimizer],
    state: dict[str, Any],
) -> Path:
    """Write the checkpoint of ``step`` finished steps into the run's folder; returns its folder."""
    folder = run / "checkpoints" / f"step-{step:07d}"
    with written_whole(folder) as scratch:
        scratch.mkdir()
        save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, scratch / MODEL)
        save_file(ema, scratch / EMA)
        save_file(_optimizer_tensors(model, optimizers), scratch / OPTIMIZER)
        (scratch / STATE).write_text(json.dumps({"step": step} | state, indent=2) + "\n", encoding="utf-8")
    return folder


def load_training_state(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> tuple[int, dict[str, Tensor]]:
    """Fill model and optimisers from a checkpoint; returns the finished steps and the moving average.

    The average is in the order of the model's parameters. Raises ValueError for what is missing, damaged or of
    another model.
    """
    step = read_state(folder)["step"]
    load_weights(folder / MODEL, model)
    parameters = dict(model.named_parameters())
    owners = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
    for key, tensor in read_tensors(folder / OPTIMIZER).items():
        name, _, slot = key.rpartition("/")
        if name not in parameters or tensor.shape not in ((), parameters[name].shape):
            raise ValueError(f"{folder / OPTIMIZER} belongs to another model: {key} {tuple(tensor.shape)}")
        p = parameters[name]
        owners[id(p)].state[p][slot] = tensor.to(p.device)
    average = read_matching(folder / EMA, parameters)
    return step, {name: average[name].to(p.device) for name, p in parameters.items()}


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill a model strictly from a safetensors file; ValueError lists what does not match.

    A model on the meta device takes the file's tensors as they are, so nothing is held twice.
    """
    tensors = read_matching(path, model.state_dict())
    model.load_state_dict(tensors, assign=any(p.is_meta for p in model.parameters()))


def read_matching(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, if they have the names and shapes of a model's own; ValueError lists what does not match."""
    tensors = read_tensors(path)
    wrong = [f"{k}: {tuple(tensors[k].shape)} in the file, {tuple(own[k].shape)} in the model"
             for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape]  # fmt: skip
    wrong += [f"{k}: not in the file" for k in own.keys() - tensors.keys()]
    wrong += [f"{k}: not in the model" for k in tensors.keys() - own.keys()]
    if wrong:
        raise ValueError(f"{path} belongs to another model: {'; '.join(sorted(wrong)[:4])} ({len(wrong)} in all)")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint: ``step``, and ``config``, the run's resolved configuration."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is not a checkpoint: its {STATE} cannot be read") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{folder} was not written by semroute train: its {STATE} tells no step")
    return state


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints in a run's folder, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the latest of a run's folder. ValueError if there is none."""
    if (path / STATE).is_file():
        return path
    found = checkpoints(path)
    if not found:
        hint = "it does not exist" if not path.exists() else "it holds no checkpoints/step-* folder"
        raise ValueError(f"no checkpoint at {path}: {hint}; give a run's folder or one of its checkpoints")
    return found[-1]


def prune(run: Path, keep: int) -> None:
    """Delete all but the latest ``keep`` checkpoints of a run, and what killed processes left half-written."""
    for folder in [*checkpoints(run)[:-keep], *(run / "checkpoints").glob(f".step-*{PARTIAL}*")]:
        _remove(folder)


def _optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Every optimiser's state under ``parameter/slot``."""
    states = {id(p): state for o in optimizers for p, state in o.state.items()}
    return {
        f"{name}/{slot}": torch.as_tensor(value).detach().contiguous()
        for name, p in model.named_parameters()
        for slot, value in states.get(id(p), {}).items()
    }


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
