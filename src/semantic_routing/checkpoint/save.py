"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

A run's folder holds ``checkpoints/step-0001000/`` with the weights, their moving average, the optimisers' state, the
random generators' and ``state.json``; several processes write their parts of each file
(``safetensors_storage.py``). A checkpoint is copied to host memory in the step and written on a thread, under a
temporary name, flushed to disk and renamed when all processes have done so: whatever bears a checkpoint's name was
complete. Nothing is ever pickled.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from semantic_routing.checkpoint.load import NAME, STATE, _step, checkpoints, random_state
from semantic_routing.checkpoint.safetensors_storage import (
    SUFFIX,
    SafetensorsWriter,
    alone,
)
from semantic_routing.common.files import PARTIAL, _remove, flush

REMNANT = re.compile(rf"\.{NAME.pattern}{re.escape(PARTIAL)}\w+")
"""... and of one that is being written or deleted."""
FILES = re.compile(rf"{re.escape(STATE)}|(model|ema|optimizer|random)(-\d{{5}}-of-\d{{5}})?{re.escape(SUFFIX)}")
"""What is in it. Nothing else is ever deleted: people keep copies and notes beside and among these files."""


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
