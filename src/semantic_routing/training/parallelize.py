"""Sharding, activation checkpointing and compilation, applied to a network from outside.

FSDP2 (``fully_shard``) on a mesh of replicas x shards serves every layout: shards only is FSDP, both is HSDP, replicas
only is DDP. A single process needs no mesh. The names of the weights stay the same, and the network's own code does not
depend on any of this.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from semantic_routing.common.device import pick_device
from semantic_routing.common.distributed import PATIENCE, World
from semantic_routing.model.dit import Backbone, Block, DiT
from semantic_routing.model.runtime import allow_graphs, compile_network
from semantic_routing.text.encoder import TextEncoder


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is distributed over the processes of torchrun, and how it trades time for memory."""

    strategy: Literal["auto", "none", "ddp", "fsdp", "hsdp"] = "auto"
    """fsdp shards weights, gradients and optimiser states over all processes, ddp replicates them, hsdp shards within
    groups of ``shard_size``; auto is fsdp, or none for one process."""
    shard_size: int = 0
    """hsdp: processes that share one copy of the weights; 0 is those of one machine."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: free a block's gathered weights after its forward pass and gather them again for its backward."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is recomputed in a block's backward pass: nothing, all except matrix products and attention, or
    everything."""
    text_encoder: Literal["replicated", "sharded", "cpu"] = "replicated"
    """Where the frozen language model is: on every device, sharded over all of them, or in host memory."""

    def __post_init__(self) -> None:
        if self.shard_size < 0:
            raise ValueError(f"shard_size is {self.shard_size}; use 0 for the number of processes of one machine")
        if self.shard_size and self.strategy != "hsdp":
            raise ValueError(f"shard_size is for the strategy hsdp, not {self.strategy}")


def arrange(world: World, cfg: ParallelConfig, device: str = "auto") -> World:
    """Set up this process's device and the mesh of all devices; ValueError if the world size does not match ``cfg``."""
    own, shape = world.everywhere(lambda: (pick_device(device), mesh_shape(cfg, world.count)))
    if shape is None:
        return replace(world, device=own)
    if own.type == "cuda":
        own = torch.device("cuda", torch.cuda.current_device())
    mesh = init_device_mesh(own.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    return replace(world, device=own, mesh=mesh, threads=dist.new_group(backend="gloo", timeout=PATIENCE))


def mesh_shape(cfg: ParallelConfig, count: int) -> tuple[int, ...] | None:
    """Return (replicas, shards) of ``count`` processes, or (shards,); None for one. ValueError if they do not fit."""
    if count == 1:
        if cfg.strategy in ("ddp", "fsdp", "hsdp") or cfg.text_encoder == "sharded":
            what = "a sharded text encoder" if cfg.text_encoder == "sharded" else f"the strategy {cfg.strategy}"
            raise ValueError(f"{what} needs several processes: start them with torchrun")
        return None
    if cfg.strategy == "none":
        raise ValueError(f"the strategy none is for one process, not {count}; leave it at auto")
    if cfg.strategy == "ddp":
        return count, 1
    if cfg.strategy != "hsdp":
        return (count,)
    size = cfg.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if count % size:
        raise ValueError(f"{count} processes do not divide into groups of shard_size {size}")
    return count // size, size


def parallelize(model: Backbone, cfg: ParallelConfig, world: World, *, bf16: bool, compiled: bool) -> Backbone:
    """Checkpoint, compile and shard the blocks of the network in place; return the network on the world's devices.

    With ``bf16``, sharded weights except the router's are gathered in bfloat16; gradients are summed in float32.
    """
    # On a CPU the layers between the blocks cost as much as the blocks. On a GPU all blocks share one small graph.
    whole_graph = compiled and world.mesh is None and world.device.type == "cpu"
    if compiled:
        allow_graphs()
    for block in model.blocks:
        if cfg.activation_checkpointing != "none":
            recompute(block, selective=cfg.activation_checkpointing == "selective")
        if compiled and not whole_graph:
            block.compile(dynamic=False)
    # On a CPU narrow texts gain nothing from a compiled norm.
    if compiled and isinstance(model, DiT) and (model.cfg.composed or not whole_graph):
        model.text_norm.compile(dynamic=True)
    if whole_graph:
        compile_network(model)
    if world.mesh is None:
        return model.to(world.device)
    reshard_blocks = cfg.reshard_after_forward and cfg.strategy != "ddp"
    _shard(model, {"mesh": world.mesh, "reshard_after_forward": reshard_blocks}, bf16)
    return model


def _shard(model: Backbone, exact: dict[str, Any], bf16: bool) -> None:
    """Shard the network by the options ``exact`` of ``fully_shard``, its blocks and text modules with ``bf16``."""
    # Casting inputs is left to autocast, which does not round times and rotary tables.
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    options = {**exact, "mp_policy": policy} if bf16 else exact
    if isinstance(model, DiT):
        if any(True for _ in model.router.parameters()):
            fully_shard(model.router, **exact)
            for name in ("mix_steps", "mix_tokens"):
                register_fsdp_forward_method(model.router, name)
        if model.noise_level is not None:
            fully_shard(model.noise_level, **exact)
        # prepare_text uses modules of every block before the blocks run: they are one group.
        fully_shard(text_modules(model), **options)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "prepare_text")
    register_fsdp_forward_method(model, "prepare_steps")
    register_fsdp_forward_method(model, "gate_time")
    # prepare_text returns views, which are never written to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)


def text_modules(model: DiT) -> list[nn.Module]:
    """Return the modules that compute the blocks' text keys and values, in the order in which they run."""
    blocks = cast(Iterable[Block], model.blocks)
    return [model.text_norm, model.text_proj, *(part for b in blocks for part in (b.cross.kv, b.cross.k_norm))]


def recompute(block: nn.Module, *, selective: bool) -> None:
    """Make a block's backward pass recompute its activations; ``selective`` keeps products and attention."""
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    inner = block.forward

    # A Python function: torch.compile does not trace into a partial of torch's function.
    def forward(*args: Any) -> Any:
        return checkpoint(inner, *args, **how)

    # An instance attribute hides the method, so that weight names and sharding hooks stay the same.
    block.__dict__["forward"] = forward


_ATEN = torch.ops.aten
_COSTLY = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(ctx: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    costly = op in _COSTLY or op.namespace == "torch_attn"  # attention without padding (varlen.py)
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def place_encoder(encoder: TextEncoder, cfg: ParallelConfig, world: World, *, compiled: bool) -> TextEncoder:
    """Place the frozen language model as ``cfg`` says; if it is sharded, all processes must encode together.

    ``compiled`` compiles it if it runs on a CPU and keeps no states on disk: kept states are read far more often than
    they are computed, and without compiling they are the same for training, sampling and ``semroute data encode``. On
    a GPU compiling does not help, because a large model's time is spent in matrix products.
    """
    if compiled and not encoder.config.keep_on_disk and "cpu" in (cfg.text_encoder, world.device.type):
        encoder.compile()
    if cfg.text_encoder == "cpu":
        return encoder
    if cfg.text_encoder == "replicated" or world.mesh is None:
        return encoder.to(world.device)
    if encoder.config.offload:
        raise ValueError("text.offload moves the whole language model, so it cannot be sharded: choose one of the two")
    model = encoder.model
    for layer in next(part for part in model.modules() if isinstance(part, nn.ModuleList)):
        fully_shard(layer, mesh=world.mesh)
    fully_shard(model, mesh=world.mesh)
    return encoder


def synchronise(model: nn.Module, now: bool) -> None:
    """Choose whether the next backward pass all-reduces gradients or only accumulates them locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


def reshard(model: nn.Module) -> None:
    """Free gathered weights after the shards were changed by something other than an optimiser step."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def unsharded(module: nn.Module) -> Iterator[nn.Module]:
    """Gather a module's own weights while the context lasts; a collective call."""
    if isinstance(module, FSDPModule):
        module.unshard()
    try:
        yield module
    finally:
        if isinstance(module, FSDPModule):
            module.reshard()


def local(x: Tensor) -> Tensor:
    """Return this process's shard of a tensor, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return a full tensor, gathered if it is sharded; a collective call."""
    return x.full_tensor() if isinstance(x, DTensor) else x
