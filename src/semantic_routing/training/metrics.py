"""How fast a run goes and what it holds: seconds by activity, images a second, utilisation, memory, routing.

Model FLOP utilisation (Chowdhery et al., 2022) is the share of the hardware's peak that the products of the
trained network need; its forward pass is counted on the meta device, backward taken as twice that. What frozen
networks compute and what activation checkpointing repeats is not counted. On a CPU there is no peak to speak of,
so no utilisation.
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
"""Products of the backward pass for each of the forward pass: one for the inputs' gradients, one for the weights'."""
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
"""Dense bfloat16 FLOP/s (products accumulated in float32) by words of a device's name, from the makers' data sheets;
the first that fits counts."""


def reproducible(row: Mapping[str, int | float | None]) -> dict[str, int | float | None]:
    """A row of metrics without what differs between two equal runs: seconds, speeds and memory."""
    return {name: x for name, x in row.items() if not name.endswith("_s") and name not in ("mfu", "memory")}


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s of a CUDA device; None for a CPU or a device that ``PEAKS`` does not know."""
    return known_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def known_peak(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device by its name, such as "NVIDIA H100 80GB HBM3"; None where not known."""
    words = set(re.split(r"[\s-]+", name))
    return next((peak for part, peak in PEAKS.items() if words.issuperset(part.split())), None)


@lru_cache(maxsize=1024)
def flops_per_image(cfg: DiTConfig, height: int, width: int, tokens: int) -> int:
    """Products of training on one latent of ``height`` x ``width`` with one prompt of ``tokens``, padding included."""
    with META:
        model = make_model(cfg)
    text, context = count_text(model, 1, tokens)
    return (1 + BACKWARD) * (text + count_image(model, 1, height, width, context)).total


class Meter:
    """What passes between two rows of metrics: seconds by activity, images, FLOPs."""

    def __init__(self, world: int = 1, peak: float | None = None) -> None:
        """``peak`` is the FLOP/s of one process's device; without one there is no utilisation."""
        self.world, self.peak = world, peak
        self._reset()

    def _reset(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = self._images = self._flops = 0
        self._began = time.perf_counter()

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Count the block's seconds as ``activity``: data, saving, sampling, validation ..."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - began

    def step(self, images: int, flops: int = 0) -> None:
        """A step is done: ``images`` of all processes together, ``flops`` of training on all of them."""
        self._steps += 1
        self._images += images
        self._flops += flops

    def row(self) -> dict[str, float]:
        """Metrics since the last row, which must hold a step; then counting begins anew.

        ``step_s``: seconds a step, whatever they went into; ``<activity>_s``: those of them that one activity took;
        ``images_per_s`` and ``mfu`` by that same time.
        """
        seconds = time.perf_counter() - self._began
        row = {"step_s": seconds / self._steps, "images_per_s": self._images / seconds}
        row |= {f"{activity}_s": spent / self._steps for activity, spent in self._seconds.items()}
        if self.peak is not None and self._flops:
            row["mfu"] = self._flops / (seconds * self.world * self.peak)
        self._reset()
        return row


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: tensors on a CUDA device, else all of its resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@torch.no_grad()
def routing_entropy(model: Backbone) -> dict[str, float]:
    """How widely the blocks read: entropy of their routing weights, and exp of it, the effective number of layers.

    Both are means over blocks and, where routing depends on time, over ``flow.FIXED_TIMES``; the first in nats. Nothing
    for arms that have no weights without a text. Where parameters are sharded, every process must come here.
    """
    if not isinstance(model, DiT) or not model.cfg.strategy.has_weights:
        return {}
    t = torch.tensor(FIXED_TIMES, device=model.proj_out.weight.device)
    with unsharded(model.router):
        entropy = entropies(model.router.weights(t))
    return {"router_entropy": entropy.mean().item(), "router_layers": entropy.exp().mean().item()}


def entropies(weights: Float[Tensor, "*rows L"]) -> Float[Tensor, "*rows"]:
    """Entropy in nats of each row of convex weights."""
    return torch.special.entr(weights).sum(-1)
