"""A network on a GPU as a CUDA graph: recorded once a batch, played back at every step without being launched anew."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.dit import Backbone, TextContext, ragged_context


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
