"""Writing checkpoints: folders of safetensors and JSON that appear completely or not at all.

A run's folder holds ``checkpoints/step-0001000/`` with the weights, their moving average, the state of optimisers and
random generators, and ``state.json``. Several processes write their parts of each file (``safetensors_storage.py``). A
checkpoint is copied to host memory during the step and written on a thread, under a temporary name. When all processes
have flushed their files to disk it is renamed, so a folder with a checkpoint's name is complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import re
import secrets
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
from semantic_routing.checkpoint.safetensors_storage import SUFFIX, SafetensorsWriter, alone
from semantic_routing.common.files import PARTIAL, _remove, flush

REMNANT = re.compile(rf"\.{NAME.pattern}{re.escape(PARTIAL)}\w+")
"""The temporary name of a checkpoint that is being written or deleted."""
FILES = re.compile(rf"{re.escape(STATE)}|(model|ema|optimizer|random)(-\d{{5}}-of-\d{{5}})?{re.escape(SUFFIX)}")
"""The files of a checkpoint. Folders with any other file are never deleted, because users keep notes in them."""


class Saver:
    """Writes a run's checkpoints on a thread while training continues, one at a time."""

    def __init__(self, run: Path, *, keep: int = 1, keep_every: int = 0, group: ProcessGroup | None = None) -> None:
        """Keep the latest ``keep`` checkpoints, and forever those of every ``keep_every``-th step, if it is above 0.

        ``group`` is a gloo group that nothing else uses, because it is used on threads; None for a single process.
        """
        self.run, self.keep, self.keep_every, self.group = run, keep, keep_every, group
        self.rank = 0 if group is None else group.rank()
        self._writing: Future[Any] | None = None
        self._folder = run

    @property
    def failed(self) -> bool:
        """Whether the latest write has failed; ``wait`` raises its error."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def save(
        self, step: int, model: nn.Module, ema: dict[str, Tensor], optimizers: list[Optimizer], state: dict[str, Any]
    ) -> Path:
        """Copy the state after ``step`` steps and start to write it; return the folder that it will be in.

        Every process must call it. It first waits for the previous checkpoint, and raises the ValueError of that one.
        """
        self.wait()
        folder = self._folder = self.run / "checkpoints" / f"step-{step:07d}"
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
            storage_writer=_CheckpointWriter(self, folder, {"step": step} | state),
            process_group=self.group,
            no_dist=self.group is None,
        )
        assert isinstance(writing, Future)  # stagers that copy on a thread return another type
        self._writing = writing
        return folder

    def wait(self) -> None:
        """Wait for the pending write; raise ValueError if it failed, on this or another process."""
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
        """Wait for the pending write and ignore its outcome, because the run is ending for another reason."""
        if self._writing is not None:
            wait([self._writing])


class _CheckpointWriter(SafetensorsWriter):
    """Writes one checkpoint under a temporary name, renames it when it is complete, and deletes old ones."""

    def __init__(self, saver: Saver, checkpoint: Path, state: dict[str, Any]) -> None:
        super().__init__(_scratch(checkpoint))
        self.saver, self.checkpoint, self.state = saver, checkpoint, state

    def begin(self) -> None:
        _remove(self.folder)
        self.folder.mkdir(parents=True)

    def end(self, files: list[str]) -> None:
        path, saver = self.folder / STATE, self.saver
        path.write_text(json.dumps(self.state | {"files": files}, indent=2) + "\n", encoding="utf-8")
        flush(path)
        flush(self.folder)
        _replace(self.checkpoint, self.folder)
        prune(saver.run, saver.keep, saver.keep_every, last=self.state["step"])


def prune(run: Path, keep: int, keep_every: int = 0, *, last: int | None = None) -> None:
    """Delete all but the latest ``keep`` checkpoints of a run, and incomplete ones of killed processes.

    Checkpoints of every ``keep_every``-th step stay, if it is above 0. So do those after step ``last``, which are
    damaged: the run will replace them. Folders with other names or with other files in them are never deleted.
    """
    found = [folder for folder in checkpoints(run) if last is None or _step(folder) <= last]
    old = [folder for folder in found[:-keep] if not keep_every or _step(folder) % keep_every]
    left = [path for path in (run / "checkpoints").glob(f".step-*{PARTIAL}*") if REMNANT.fullmatch(path.name)]
    for folder in [*old, *left]:
        if _is_own(folder):
            _remove(folder)


def optimizer_tensors(model: nn.Module, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Return the state of all optimisers under names ``parameter/slot``."""
    states = {id(p): state for o in optimizers for p, state in o.state.items()}
    return {
        f"{name}/{slot}": torch.as_tensor(value).detach()
        for name, p in model.named_parameters()
        for slot, value in states.get(id(p), {}).items()
    }


def _is_own(folder: Path) -> bool:
    """Check that a folder holds only files that a run writes into a checkpoint."""
    return folder.is_dir() and not folder.is_symlink() and all(FILES.fullmatch(path.name) for path in folder.iterdir())


def _scratch(folder: Path) -> Path:
    """Return the temporary name of a checkpoint that is being written, the same on all processes."""
    return folder.with_name(f".{folder.name}{PARTIAL}0")


def _replace(folder: Path, scratch: Path) -> None:
    """Rename a complete checkpoint to its final name; an old one of that name is deleted only afterwards.

    If the old one holds a user's files, it is kept under another name.
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
