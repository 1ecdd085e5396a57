"""How a run is laid out on GPUs: shards, microbatches and the memory of each GPU."""

from __future__ import annotations

from dataclasses import dataclass

from semantic_routing.analysis.planning.counts import FLOAT, Counts
from semantic_routing.analysis.planning.hardware import Assumptions, Gpu
from semantic_routing.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Shards, microbatches and memory of each GPU."""

    gpus: int
    nodes: int
    """Machines."""
    shards: int
    """GPUs that share one copy of weights, gradients and states; 1 replicates everything."""
    shard_nodes: int
    """Machines of such a group."""
    images: int
    """Images of each GPU in a step."""
    microbatch: int
    """Images of each GPU per microbatch."""
    memory: float
    """Bytes that each GPU needs."""
    fits: bool
    """Whether that is within the usable memory."""

    @property
    def accumulate(self) -> int:
        """Microbatches of each GPU in a step."""
        return self.images // self.microbatch


def lay_out(cfg: TrainConfig, counts: Counts, gpu: Gpu, gpus: int, assumed: Assumptions) -> Layout:
    """Choose the largest microbatch that fits, with at least ``cfg.accumulate`` of them; ValueError if none divides.

    A run that does not fit even with one image per microbatch gets that layout, marked as not fitting.
    """
    shards = check_groups(cfg, gpus, assumed)
    nodes, images = assumed.nodes(gpus), cfg.share(gpus)
    states = (counts.states + FLOAT * counts.parameters) / shards
    encoder_shards = gpus if cfg.parallel.text_encoder == "sharded" else 1
    frozen = counts.frozen / encoder_shards
    gathered = counts.gathered if shards > 1 else 0
    each = counts.activations[cfg.parallel.activation_checkpointing] + counts.ahead
    usable = assumed.usable_memory * gpu.memory

    def needed(microbatch: int) -> float:
        # Microbatches accumulate unsharded gradients.
        several = FLOAT * counts.parameters if microbatch < images and shards > 1 else 0
        return states + frozen + gathered + several + microbatch * each

    sizes = [n for n in range(images // cfg.accumulate, 0, -1) if images % n == 0]
    chosen = next((n for n in sizes if needed(n) <= usable), 1)
    return Layout(
        gpus=gpus,
        nodes=nodes,
        shards=shards,
        shard_nodes=max(1, shards // assumed.node),
        images=images,
        microbatch=chosen,
        memory=needed(chosen),
        fits=needed(chosen) <= usable,
    )


def check_groups(cfg: TrainConfig, gpus: int, assumed: Assumptions) -> int:
    """Return the GPUs that share one copy of the weights, as ``parallelize.mesh_shape`` arranges them.

    Raises ValueError if batch, machines or groups do not divide.
    """
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}; a plan needs at least 1")
    assumed.nodes(gpus)
    cfg.share(gpus)
    strategy = cfg.parallel.strategy
    if cfg.parallel.text_encoder == "cpu":
        raise ValueError(
            "semroute plan cannot time a language model on the CPU: set --parallel.text-encoder replicated"
        )
    if strategy == "none" and gpus > 1:
        raise ValueError(f"the strategy none is for one process, not {gpus}; leave it at auto")
    if strategy in ("ddp", "none"):
        return 1
    if strategy != "hsdp":
        return gpus
    size = cfg.parallel.shard_size or min(gpus, assumed.node)
    if gpus % size:
        raise ValueError(f"{gpus} processes do not divide into groups of shard_size {size}")
    return size
