"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights move; the defaults are the paper's (Section 4.1)."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for the blocks' matrices and AdamW for the rest."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    muon_lr: float = 0.02
    """Learning rate of Muon: each step is an orthogonal matrix times this and sqrt(rows/columns) if above 1."""
    router_lr: float | None = None
    """Learning rate of the router, where it should differ from ``lr``."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the gradient's first and second moments."""
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of all but the router."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    warmup: int = 0
    """Steps over which the rates rise from zero."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """How the rates fall towards the last step: not at all, or to zero."""

    def __post_init__(self) -> None:
        for name in ("lr", "muon_lr", "router_lr", "weight_decay", "warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; it must be at least 0")
        if not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0")
        if not all(0 <= decay < 1 for decay in (*self.betas, self.momentum)):
            raise ValueError(f"betas {self.betas} and momentum {self.momentum} must be from 0 to below 1")


def make_optimizers(model: nn.Module, cfg: OptimConfig, blocks: str = "blocks.") -> list[Optimizer]:
    """The optimisers for a model's weights; every group keeps its full rate under ``base_lr``.

    ``blocks`` begins the names of the weights whose matrices Muon takes, where it is chosen.
    """
    router: list[Tensor] = []
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in model.named_parameters():
        if name.startswith("router."):
            router.append(p)
        elif cfg.name == "muon" and p.ndim == 2 and name.startswith(blocks) and ".modulation." not in name:
            matrices.append(p)
        else:
            others.append(p)
    groups: list[dict[str, Any]] = [{"params": others}]
    if router:
        rate = cfg.lr if cfg.router_lr is None else cfg.router_lr
        groups.append({"params": router, "lr": rate, "weight_decay": 0.0})
    optimizers: list[Optimizer] = [AdamW(groups, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)]
    if matrices:
        optimizers.append(
            (ShardedMuon if isinstance(matrices[0], DTensor) else Muon)(
                matrices,
                lr=cfg.muon_lr,
                momentum=cfg.momentum,
                weight_decay=cfg.weight_decay,
                adjust_lr_fn="original",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


class ShardedMuon(Muon):
    """Muon for sharded weights: momentum and decay stay with the shards, and every matrix is orthogonalised whole.

    The processes take the matrices in turns, each one of as many as there are processes, and send what came of it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move all weights; every process must call it. There is no use for a ``closure``."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            steps = _orthogonal_steps([self._momentum(p, group["momentum"]) for p in params])
            for p, step in zip(params, steps, strict=True):
                p.to_local().mul_(1 - group["lr"] * group["weight_decay"]).sub_(step, alpha=group["lr"])

    def _momentum(self, p: DTensor, momentum: float) -> DTensor:
        """Nesterov's: the gradient moved towards its decaying average."""
        assert isinstance(p.grad, DTensor)
        state, grad = self.state[p], p.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].to_local().lerp_(grad.to_local(), 1 - momentum)
        ahead = grad.to_local().lerp(state["momentum_buffer"].to_local(), momentum)
        return DTensor.from_local(ahead, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())


def _orthogonal_steps(updates: list[DTensor]) -> Iterator[Tensor]:
    """This process's part of what Muon subtracts at a rate of 1, for each matrix."""
    rank, count = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(updates), count):
        turn = updates[first : first + count]
        wholes = (update.full_tensor() for update in turn)  # one at a time: all processes gather, one keeps
        mine = [_orthogonal_step(whole) for owner, whole in enumerate(wholes) if owner == rank]
        for owner, update in enumerate(turn):
            step = mine[0] if owner == rank else torch.empty(update.shape, device=update.device, dtype=update.dtype)
            dist.broadcast(step, owner)
            yield distribute_tensor(step, update.device_mesh, update.placements, src_data_rank=None).to_local()


def _orthogonal_step(update: Tensor) -> Tensor:
    """What torch's own Muon subtracts at a rate of 1, without momentum and decay."""
    still = nn.Parameter(torch.zeros_like(update))
    still.grad = update
    Muon([still], lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0, adjust_lr_fn="original").step()
    return -still.detach()


def set_rates(optimizers: list[Optimizer], cfg: OptimConfig, step: int, steps: int) -> float:
    """Set the rates of step ``step`` (from 0) of ``steps``; returns their factor in [0, 1]."""
    progress = step / steps
    factor = {
        "constant": 1.0,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
        "linear": 1 - progress,
    }[cfg.decay]
    factor *= min(1.0, (step + 1) / max(cfg.warmup, 1))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    return factor
