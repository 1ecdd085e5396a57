"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
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
            Muon(
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
