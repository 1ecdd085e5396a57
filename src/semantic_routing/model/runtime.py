"""A network on a GPU as a CUDA graph: recorded once a batch, played back at every step without being launched anew."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from semantic_routing.model.context import TextContext, ragged_context
from semantic_routing.model.dit import Backbone


class Recording:
    """The velocity of a network, to be called as the network is.

    The first call of some sizes runs as it is, which compiles and warms up what there is to; the second is recorded. A
    recording reads the weights where they are: it must not outlive them, nor an autocast around its calls.
    """

    def __init__(self, model: Backbone) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.sizes: tuple[object, ...] = ()
        """Of the last call: what a graph holds fast."""

    def __call__(
        self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"], context: TextContext
    ) -> Float[Tensor, "B Ch h w"]:
        given = [x, t, *_tensors(context)]
        longest = None if context.ragged is None else context.ragged.longest
        sizes = (longest, *((y.shape, y.dtype) for y in given))
        if sizes != self.sizes:
            self.sizes, self.graph = sizes, None
            self.inputs = x.clone(), t.clone(), _copied(context)
            return self.model(*self.inputs)
        x, t, context = self.inputs
        torch._foreach_copy_([x, t, *_tensors(context)], given)
        if self.graph is None:
            self._record()
        assert self.graph is not None
        self.graph.replay()
        return self.out.clone()

    def _record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.out = self.model(*self.inputs)


def _tensors(context: TextContext) -> list[Tensor]:
    more = [context.mask, None if context.ragged is None else context.ragged.ends]
    return [*context.keys, *context.values, *(x for x in more if x is not None)]


def _copied(context: TextContext) -> TextContext:
    keys, values = (tuple(x.clone() for x in xs) for xs in (context.keys, context.values))
    if context.ragged is not None:
        return ragged_context(keys, values, context.ragged._replace(ends=context.ragged.ends.clone()))
    return replace(context, keys=keys, values=values, mask=None if context.mask is None else context.mask.clone())


_ROUNDING = threading.Lock()
_ROUNDED: dict[nn.Module, tuple[int, list[tuple[nn.Parameter, Tensor]]]] = {}
"""Networks whose weights are rounded now: by how many calls, and what the weights are."""
GRAPHS = 32
"""Compiled graphs of one function that are kept."""


def autocast(device: torch.device, bf16: bool) -> torch.autocast | nullcontext[None]:
    """Products in bfloat16, or everything as it is."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()


@contextmanager
def rounded_once(model: nn.Module, bf16: bool) -> Iterator[None]:
    """Weights of products are bfloat16 while the context lasts: what autocast makes of them anew at every step.

    Sharded weights stay as they are: they are gathered in bfloat16.
    """
    if not bf16:
        yield
        return
    with _ROUNDING:  # calls in several threads share the weights: the first rounds, the last puts back
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
    """Compile a network to sample from, anew for every size of picture and, on a CPU, of text.

    On a CPU one graph of the whole network and one of its text: what lies between the blocks costs as much as they do.
    On a GPU all blocks share one small graph, and a sampler records them together as a CUDA graph.
    """
    allow_graphs()
    if model.proj_out.weight.device.type == "cuda":
        for block in model.blocks:
            block.compile(dynamic=False)
        model.recorded = True
        return
    model.compile(dynamic=False)
    model.__dict__["prepare_text"] = torch.compile(model.prepare_text, dynamic=False)


def allow_graphs() -> None:
    """Let torch keep a graph for each length that texts are padded to, which are more than its eight."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
