"""Running a network fast: CUDA graphs, bfloat16 autocast, compilation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from semantic_routing.model.context import TextContext, packed_context
from semantic_routing.model.dit import Backbone


class CUDAGraphRunner:
    """A network's forward pass, captured as a CUDA graph and replayed at every sampling step.

    The first call with new sizes runs eagerly, which compiles and warms up; the second captures the graph. The graph
    reads the weights where they are in memory, so it must not outlive them or an autocast around its calls.
    """

    def __init__(self, model: Backbone) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.sizes: tuple[object, ...] = ()
        """Sizes and dtypes of the last call, for which the graph holds."""

    def __call__(
        self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"], context: TextContext
    ) -> Float[Tensor, "B Ch h w"]:
        given = [x, t, *_tensors(context)]
        max_seqlen = None if context.packing is None else context.packing.max_seqlen
        sizes = (max_seqlen, *((y.shape, y.dtype) for y in given))
        if sizes != self.sizes:
            self.sizes, self.graph = sizes, None
            self.inputs = x.clone(), t.clone(), _clone(context)
            return self.model(*self.inputs)
        x, t, context = self.inputs
        torch._foreach_copy_([x, t, *_tensors(context)], given)  # private (torch 2.13): one kernel for all copies
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.out = self.model(*self.inputs)
        self.graph.replay()
        return self.out.clone()


def _tensors(context: TextContext) -> list[Tensor]:
    more = [context.mask, None if context.packing is None else context.packing.cu_seqlens]
    return [*context.keys, *context.values, *(x for x in more if x is not None)]


def _clone(context: TextContext) -> TextContext:
    keys, values = (tuple(x.clone() for x in xs) for xs in (context.keys, context.values))
    if context.packing is not None:
        packing = context.packing._replace(cu_seqlens=context.packing.cu_seqlens.clone())
        return packed_context(keys, values, packing)
    return replace(context, keys=keys, values=values, mask=None if context.mask is None else context.mask.clone())


_ROUNDING = threading.Lock()
_ROUNDED: dict[nn.Module, tuple[int, list[tuple[nn.Parameter, Tensor]]]] = {}
"""Networks whose weights are rounded now: the number of users, and the exact weights."""
GRAPHS = 32
"""Compiled graphs kept for one function."""


def autocast(device: torch.device, bf16: bool) -> torch.autocast | nullcontext[None]:
    """Return a context in which matrix products run in bfloat16, or a context without effect."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def rounded_once(model: nn.Module, bf16: bool) -> Iterator[None]:
    """Round the weights of linear layers to bfloat16 once within the context, instead of casting them at every step.

    Sharded weights are left alone: they are gathered in bfloat16.
    """
    if not bf16:
        yield
        return
    with _ROUNDING:  # calls in several threads share the weights: the first rounds, the last restores
        users, exact = _ROUNDED.get(model, (0, []))
        if not users:
            linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
            exact = [(p, p.data) for m in linears for p in m.parameters() if not isinstance(p.data, DTensor)]
            for p, x in exact:
                p.data = x.bfloat16()
        _ROUNDED[model] = users + 1, exact
    try:
        yield
    finally:
        with _ROUNDING:
            users, exact = _ROUNDED.pop(model)
            if users > 1:
                _ROUNDED[model] = users - 1, exact
            else:
                for p, x in exact:
                    p.data = x


def compile_network(model: Backbone) -> None:
    """Compile a network for sampling; it recompiles for every image size and, on a CPU, text length.

    On a CPU there is one graph for the network and one for its text, because the code between the blocks costs as much
    as the blocks. On a GPU, all blocks share one small graph, and samplers capture them together as a CUDA graph.
    """
    allow_graphs()
    if model.proj_out.weight.device.type == "cuda":
        for block in model.blocks:
            block.compile(dynamic=False)
        model.use_cuda_graph = True
        return
    model.compile(dynamic=False)
    model.__dict__["prepare_text"] = torch.compile(model.prepare_text, dynamic=False)


def allow_graphs() -> None:
    """Let torch keep ``GRAPHS`` compiled graphs of a function, one for each padded text length; its default is 8."""
    # Private: torch.compiler (2.13) has no public setting. Beyond its limit torch runs eagerly.
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
