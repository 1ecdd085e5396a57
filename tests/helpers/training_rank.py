"""One process of a run in ``training/test_distributed.py``, which runs this file with the global ``TASK``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(task: dict[str, Any]) -> None:
    """One rank."""
    victim = task["rank"] == task["victim"]
    log = os.open(task["log"], os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= task["environment"]
    import torch

    from semantic_routing.common.config import read_config
    from semantic_routing.common.errors import Interrupted, TrainingFailed, exit_code
    from semantic_routing.training.config import TrainConfig
    from semantic_routing.training.loop import resume, start

    torch.set_num_threads(1)

    def on_step(step: int) -> None:
        if victim and step == task["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if victim and step == task["signal_at"]:
            os.kill(os.getpid(), signal.SIGTERM)

    if victim:
        break_writing(task["kill_file"], task["full_at"])
    out = Path(task["out"])
    try:
        if task["config"]:
            start(read_config(TrainConfig, Path(task["config"])), out, on_step)
        else:
            resume(out, on_step)
    except (ValueError, TrainingFailed, Interrupted) as error:
        sys.stderr.write(f"semroute: {error}\n")
        sys.exit(exit_code(error))


def break_writing(kill_file: int, full_at: str) -> None:
    """Let the writing of a checkpoint's files end badly."""
    from semantic_routing.checkpoint import safetensors_storage as storage

    save_file: Callable[..., None] = storage.save_file
    written = []

    def broken(tensors: Any, path: Path, header: Any) -> None:
        written.append(path)
        if len(written) == kill_file:
            path.write_bytes(b"half of a f")
            os.kill(os.getpid(), signal.SIGKILL)
        if full_at and full_at in str(path):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, header)

    storage.save_file = broken


if __name__ == "__main__":
    main(globals()["TASK"])
