"""Finding, checking and reading checkpoints; loading training state into model and optimisers."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from semantic_routing.checkpoint.safetensors_storage import SUFFIX, SafetensorsReader, alone, open_tensors

MODEL, EMA, OPTIMIZER, RANDOM = (f"{name}{SUFFIX}" for name in ("model", "ema", "optimizer", "random"))
STATE = "state.json"
NAME = re.compile(r"step-(\d{7,})")
"""The name of a checkpoint's folder."""


def load_training_state(
    folder: Path, model: nn.Module, optimizers: list[Optimizer], group: ProcessGroup | None = None
) -> dict[str, Tensor]:
    """Load model, optimisers and, if this rank saved them, random generators; return the moving average.

    The average is in the order of the model's parameters. Raises ValueError if files are missing, damaged or of another
    model.
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
    """Return the state of this process's random generators, which only user code uses."""
    state = {f"{rank}.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"{rank}.cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Set the random generators to a state that ``random_state`` returned."""
    for name, tensor in state.items():
        (torch.cuda.set_rng_state if name.endswith(".cuda") else torch.set_rng_state)(tensor)


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a model strictly from a file such as ``ema.safetensors`` or its parts; ValueError lists mismatches.

    A model on the meta device takes the file's tensors themselves, so nothing is in memory twice.
    """
    tensors = read_tensors(path)
    _check_same(path, {k: x.shape for k, x in tensors.items()}, {k: x.shape for k, x in model.state_dict().items()})
    model.load_state_dict(tensors, assign=any(p.is_meta for p in model.parameters()))


def read_tensors(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a file such as ``model.safetensors`` or its parts whose names begin with ``prefix``.

    Raises ValueError if a file is missing or damaged.
    """
    if path.is_file() and not prefix:
        with open_tensors(path):
            return load_file(path)
    found = SafetensorsReader(path.parent, [path.stem]).tensors(f"{path.stem}.{prefix}")
    return _below(found, f"{path.stem}.")


def read_state(folder: Path) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint: ``step``, ``config`` (the run's resolved configuration) and more."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is not a checkpoint: its {STATE} cannot be read") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{folder} was not written by semroute train: its {STATE} has no step")
    return state


def read_whole(folder: Path) -> dict[str, Any]:
    """Read ``state.json``; raise ValueError if a file of the checkpoint is missing or damaged, judged by its header."""
    state = read_state(folder)
    for path in sorted({*(folder / name for name in state.get("files", [])), *folder.glob(f"*{SUFFIX}")}):
        with open_tensors(path):
            pass
    return state


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run, oldest first; unfinished ones have other names."""
    return sorted((f for f in (run / "checkpoints").glob("step-*") if NAME.fullmatch(f.name)), key=_step)


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the latest complete checkpoint of the run ``path``.

    Damaged ones are skipped with a line on stderr. Raises ValueError if no checkpoint is complete.
    """
    return path if (path / STATE).is_file() else _latest_whole(path)[0]


def open_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder that ``find_checkpoint`` finds and its ``state.json``, which is read once."""
    return (path, read_state(path)) if (path / STATE).is_file() else _latest_whole(path)


def _latest_whole(path: Path) -> tuple[Path, dict[str, Any]]:
    first = None
    for folder in reversed(checkpoints(path)):
        try:
            state = read_whole(folder)
        except ValueError as error:
            first = first or error
            continue
        if first is not None:
            sys.stderr.write(f"semroute: {first}; resuming from {folder}\n")
        return folder, state
    if first is not None:
        raise ValueError(f"no complete checkpoint at {path}: {first}")
    hint = "it does not exist" if not path.exists() else "it holds no checkpoints/step-* folder"
    raise ValueError(f"no checkpoint at {path}: {hint}; give a run's folder or one of its checkpoints")


def _check_same(path: Path, found: Mapping[str, torch.Size], own: Mapping[str, torch.Size]) -> None:
    """Raise ValueError that lists how a file's names and shapes differ from a model's."""
    wrong = [f"{k}: {tuple(found[k])} in the file, {tuple(own[k])} in the model"
             for k in own.keys() & found.keys() if own[k] != found[k]]  # fmt: skip
    wrong += [f"{k}: not in the file" for k in own.keys() - found.keys()]
    wrong += [f"{k}: not in the model" for k in found.keys() - own.keys()]
    if wrong:
        raise ValueError(f"{path} belongs to another model: {'; '.join(sorted(wrong)[:4])} ({len(wrong)} in all)")


def _below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Select the entries whose names begin with ``prefix``, and remove it."""
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _step(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))
