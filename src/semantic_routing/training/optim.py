"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

from semantic_routing.common.device import has_bfloat16

BATCH_ELEMENTS = 2**26
"""Most elements of matrices that Muon orthogonalises together; bounds the memory of their copies."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and learning-rate schedule; the defaults are the paper's (Section 4.1)."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW for all weights, or Muon for the matrices of the blocks and AdamW for the rest."""
    lr: float = 1e-4
    """Learning rate of AdamW."""
    muon_lr: float = 0.02
    """Learning rate of Muon; an update is an orthogonal matrix times this and max(1, sqrt(rows/columns))."""
    router_lr: float | None = None
    """Learning rate of the router; by default ``lr``."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of all weights except those of the router."""
    clip: float = 1.0
    """Gradient clipping: largest norm of the gradient of all weights together."""
    warmup: int = 0
    """Steps of linear learning-rate warmup."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate schedule after the warmup: constant, or a decay to zero at the last step."""

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
    """Make the optimisers of a model's weights; every parameter group stores its peak learning rate as ``base_lr``.

    With Muon, ``blocks`` is the name prefix of the weights whose matrices it updates.
    """
    router, matrices, others = list[Tensor](), list[Tensor](), list[Tensor]()
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
        kind = ShardedMuon if isinstance(matrices[0], DTensor) else BatchedMuon
        decay, momentum = cfg.weight_decay, cfg.momentum
        optimizers.append(kind(matrices, cfg.muon_lr, decay, momentum=momentum, adjust_lr_fn="original"))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


class BatchedMuon(Muon):
    """torch's Muon with all matrices of one shape orthogonalised together: bitwise the same steps, but faster."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights; ``closure`` is ignored."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            steps = self._steps([self._momentum(p, group["momentum"]) for p in params])
            for p, step in zip(params, steps, strict=True):
                scale = math.sqrt(max(1, p.shape[0] / p.shape[1]))
                local = p.to_local() if isinstance(p, DTensor) else p
                local.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-group["lr"] * scale)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        """Return the Nesterov update: the gradient moved towards its moving average."""
        assert p.grad is not None
        state, grad = self.state[p], p.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].lerp_(grad, 1 - momentum)
        return grad.lerp(state["momentum_buffer"], momentum)

    def _steps(self, updates: list[Tensor]) -> Iterable[Tensor]:
        """Return the orthogonal matrix nearest to each update."""
        found = list(updates)
        for indices in _same_shape(updates):
            rows = orthogonal(torch.stack([updates[i].to(_precision(updates[i].device)) for i in indices]))
            for i, row in zip(indices, rows, strict=True):
                found[i] = row
        return found


class ShardedMuon(BatchedMuon):
    """Muon for sharded weights: momentum and decay on the shards, orthogonalisation of gathered matrices.

    The processes take turns: each orthogonalises one matrix of every ``world size`` matrices and broadcasts the result.
    """

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        assert isinstance(p, DTensor)
        assert isinstance(p.grad, DTensor)
        state, grad = self.state[p], p.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        state["momentum_buffer"].to_local().lerp_(grad.to_local(), 1 - momentum)
        ahead = grad.to_local().lerp(state["momentum_buffer"].to_local(), momentum)
        return DTensor.from_local(ahead, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())

    def _steps(self, updates: list[Tensor]) -> Iterator[Tensor]:
        """Yield this process's shards of the orthogonal matrices; a collective call."""
        rank, count = dist.get_rank(), dist.get_world_size()
        for first in range(0, len(updates), count):
            turn = cast(list[DTensor], updates[first : first + count])
            wholes = (update.full_tensor() for update in turn)  # one at a time: all gather, only the owner keeps it
            mine = [orthogonal(whole[None])[0] for owner, whole in enumerate(wholes) if owner == rank]
            for owner, update in enumerate(turn):
                empty = torch.empty(update.shape, device=update.device, dtype=_precision(update.device))
                step = mine[0].contiguous() if owner == rank else empty
                dist.broadcast(step, owner)
                yield distribute_tensor(step, update.device_mesh, update.placements, src_data_rank=None).to_local()


def orthogonal(matrices: Float[Tensor, "K m n"]) -> Float[Tensor, "K m n"]:
    """Approximate U V^T of each matrix U S V^T by five Newton-Schulz iterations (Jordan et al., 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(_precision(matrices.device))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _precision(device: torch.device) -> torch.dtype:
    """Return the type of the iterations: bfloat16, or float32 on hardware without it, where that is faster."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def _same_shape(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    """Yield the indices of matrices of one shape, in groups of at most ``BATCH_ELEMENTS`` elements."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    for shape, indices in by_shape.items():
        size = max(1, BATCH_ELEMENTS // shape.numel())
        yield from (indices[i : i + size] for i in range(0, len(indices), size))


def set_rates(optimizers: list[Optimizer], cfg: OptimConfig, step: int, progress: float) -> float:
    """Set the learning rates of a step (from 0); return their share of the peak, in [0, 1].

    The warm-up follows the step, and the decay the progress of the run, from 0 to 1.
    """
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
