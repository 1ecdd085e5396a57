"""Writing a checkpoint in one call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from semantic_routing.checkpoint.save import Saver


def save_checkpoint(
    run: Path, step: int, model: nn.Module, ema: dict[str, Tensor], optimizers: list[Optimizer], state: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step, delete none, and return its folder."""
    saver = Saver(run, keep=sys.maxsize)
    folder = saver.save(step, model, ema, optimizers, state)
    saver.wait()
    return folder
