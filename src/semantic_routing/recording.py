"""A network on a GPU as a CUDA graph: recorded once a batch, played back at every step without being launched anew."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.dit import Backbone, TextContext


class Recording:
    """The velocity of a network, to be called as the network is.

    The first call of some sizes runs as it is, which compiles and warms up what there is to; the second is recorded. A
    recording reads the weights where they are: it must not outlive them, nor an autocast around its calls.
    """

    def __init__(self, model: Backbone) -> None:
        self.model = model
        self.graph: torch.cuda.CUDAGraph | None = None
        self.seen: list[object] = []
        """Sizes of the last call."""

    def __call__(
        self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"], context: TextContext
    ) -> Float[Tensor, "B Ch h w"]:
        given = [x, t, *_tensors(context)]
        sizes = [(y.shape, y.dtype) for y in given]
        if sizes != self.seen:
            self.seen, self.graph = sizes, None
            return self.model(x, t, context)
        if self.graph is None:
            self._record(x, t, context)
        else:
            torch._foreach_copy_(self.inputs, given)
        assert self.graph is not None
        self.graph.replay()
        return self.out.clone()

    def _record(self, x: Tensor, t: Tensor, context: TextContext) -> None:
        x, t, context = x.clone(), t.clone(), _copied(context)
        self.inputs, self.graph = [x, t, *_tensors(context)], torch.cuda.CUDAGraph()
        on, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        # What autocast would keep from one product to the next would be the graph's own memory.
        with torch.cuda.graph(self.graph), torch.autocast("cuda", dtype, enabled=on, cache_enabled=False):
            self.out = self.model(x, t, context)


def _tensors(context: TextContext) -> list[Tensor]:
    more = [context.mask, None if context.ragged is None else context.ragged.ends]
    return [*context.keys, *context.values, *(x for x in more if x is not None)]


def _copied(context: TextContext) -> TextContext:
    keys, values = (tuple(x.clone() for x in xs) for xs in (context.keys, context.values))
    mask = None if context.mask is None else context.mask.clone()
    ragged = context.ragged
    return replace(
        context,
        keys=keys,
        values=values,
        mask=mask,
        ragged=None if ragged is None else ragged._replace(ends=ragged.ends.clone()),
    )
