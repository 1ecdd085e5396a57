"""A small training state, and writing its checkpoint in one call."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from semantic_routing.checkpoint.save import Saver
from semantic_routing.training.optim import OptimConfig, make_optimizers


def save_checkpoint(
    run: Path, step: int, model: nn.Module, ema: dict[str, Tensor], optimizers: list[Optimizer], state: dict[str, Any]
) -> Path:
    """Write the checkpoint of a step, delete none, and return its folder."""
    saver = Saver(run, keep=sys.maxsize)
    folder = saver.save(step, model, ema, optimizers, state)
    saver.wait()
    return folder


class Net(nn.Module):
    """More than ten blocks of one shape, so that an order by name would mix them up."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
        self.out = nn.Linear(3, 2)


def trained(steps: int = 3) -> tuple[Net, dict[str, Tensor], list[Optimizer]]:
    """Return a network after some steps, a random moving average, and the optimisers."""
    model = Net()
    optimizers = make_optimizers(model, OptimConfig(name="muon", lr=0.1))
    for _ in range(steps):
        train(model, optimizers)
    return model, {name: torch.randn_like(p) for name, p in model.named_parameters()}, optimizers


def train(model: Net, optimizers: list[Optimizer]) -> None:
    """Take one step with random gradients."""
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()


def files(folder: Path) -> dict[str, bytes]:
    """Read all files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
