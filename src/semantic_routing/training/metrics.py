"""Metrics of a run: seconds by activity, images per second, MFU, memory, routing entropy.

Model FLOPs utilisation (MFU; Chowdhery et al., 2022) is the share of the hardware's peak FLOP/s that the matrix
products of the trained network use. The FLOPs of the forward pass are counted on the meta device, and those of the
backward pass are taken as twice that. Frozen networks and the recomputation of activation checkpointing are not
counted. The peak of a CPU is unknown, so there is no MFU.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.flow import FIXED_TIMES
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiT, DiTConfig
from semantic_routing.model.flops import META, count_image, count_text
from semantic_routing.training.parallelize import unsharded

BACKWARD = 2
"""Products of the backward pass per product of the forward pass: for the gradients of inputs and of weights."""
PEAKS = {
    "B300": 2250e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 311.8e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}
"""Dense bfloat16 FLOP/s (accumulated in float32) by words of a device's name, from the makers' data sheets; the first
match counts."""


def reproducible(row: Mapping[str, int | float | None]) -> dict[str, int | float | None]:
    """Remove from a row of metrics what differs between two identical runs: seconds, speeds and memory."""
    return {name: x for name, x in row.items() if not name.endswith("_s") and name not in ("mfu", "memory")}


def peak_flops(device: torch.device) -> float | None:
    """Return the dense bfloat16 FLOP/s of a CUDA device; None for a CPU or a device that is not in ``PEAKS``."""
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def known_peak(name: str) -> float | None:
    """Return the dense bfloat16 FLOP/s of a device name such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    words = set(re.split(r"[\s-]+", name))
    return next((peak for part, peak in PEAKS.items() if words.issuperset(part.split())), None)


@lru_cache(maxsize=1024)
def flops_per_image(cfg: DiTConfig, height: int, width: int, tokens: int) -> int:
    """Return the training FLOPs of one ``height`` x ``width`` latent with one prompt of ``tokens`` (with padding).

    Products that serve a whole batch, such as the composed projections of finer arms, are not counted.
    """
    with META:
        model = make_model(cfg)
    text, context = count_text(model, 1, tokens)
    another = count_text(model, 2, tokens)[0].total - text.total
    return (1 + BACKWARD) * (another + count_image(model, 1, height, width, context).total)


class Meter:
    """Counts seconds by activity, images and FLOPs between two rows of metrics."""

    def __init__(self, world: int = 1, peak: float | None = None) -> None:
        """Count for ``world`` processes; ``peak`` is the FLOP/s of one process's device, None for no MFU."""
        self.world, self.peak = world, peak
        self._reset()

    def _reset(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = self._images = self._flops = 0
        self._began = time.perf_counter()

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Count the context's seconds as ``activity``: data, saving, sampling, validation ..."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - began

    def step(self, images: int, flops: int = 0) -> None:
        """Count a step of ``images`` and training ``flops``, of all processes together."""
        self._steps += 1
        self._images += images
        self._flops += flops

    def row(self) -> dict[str, float]:
        """Return the metrics since the last row, with at least one step, and reset the counts.

        ``step_s``: all seconds per step; ``<activity>_s``: those of one activity; ``images_per_s`` and ``mfu``: over
        all seconds.
        """
        seconds = time.perf_counter() - self._began
        row = {"step_s": seconds / self._steps, "images_per_s": self._images / seconds}
        row |= {f"{activity}_s": spent / self._steps for activity, spent in self._seconds.items()}
        if self.peak is not None and self._flops:
            row["mfu"] = self._flops / (seconds * self.world * self.peak)
        self._reset()
        return row


def peak_memory(device: torch.device) -> int:
    """Return this process's peak memory in bytes: tensors on a CUDA device, else its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def routing_entropy(model: Backbone) -> dict[str, float]:
    """Return the entropy of the blocks' routing weights in nats, and exp of it, the effective number of layers.

    Both are means over blocks and, if routing depends on time, over ``flow.FIXED_TIMES``. Arms whose weights need a
    prompt return nothing. This is a collective call if parameters are sharded.
    """
    if not isinstance(model, DiT) or not model.cfg.strategy.has_weights:
        return {}
    t = torch.tensor(FIXED_TIMES, device=model.proj_out.weight.device)
    with unsharded(model.router):
        entropy = entropies(model.router.weights(t))
    return {"router_entropy": entropy.mean().item(), "router_layers": entropy.exp().mean().item()}


def entropies(weights: Float[Tensor, "*rows L"]) -> Float[Tensor, "*rows"]:
    """Return the entropy in nats of each row of convex weights."""
    return torch.special.entr(weights).sum(-1)
