"""Routing on a pipeline of this program: the router's own mix is the original state, to which layers are mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from semantic_routing.adopt.arguments import by_name
from semantic_routing.adopt.moments import restyled
from semantic_routing.adopt.routing import Routing


class OwnMechanism:
    """The hook of a router that changes its result [D or 1, B, N, C]."""

    def __init__(self, transformer: Any, routing: Routing) -> None:
        self.base, self.routing = transformer.backbone.router, routing

    def install(self) -> list[Any]:
        """Register the hook and return its handle."""
        if self.routing.depends_on_time:
            self.base.depends_on_time = True  # of this instance: pipelines then prepare the text for every time
        self.base.mix_steps = self._mix_steps  # which does not call the router, so that no hook would run
        return [self.base.register_forward_hook(self._route, with_kwargs=True)]

    def forget(self) -> None:
        """Restore the router's own dependence on time, and its own mixing for several times."""
        for name in ("depends_on_time", "mix_steps"):
            self.base.__dict__.pop(name, None)

    def _mix_steps(self, hidden: Tensor, times: Tensor) -> Tensor:
        """Return the routed text [T, D, B, N, C] at each of several times."""
        blocks = self.routing.facts.blocks
        return torch.stack([self.base(hidden, t[None]).expand(blocks, -1, -1, -1) for t in times])

    def _route(self, router: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        given = by_name(("hidden", "t"), args, kwargs)
        hidden, facts = given["hidden"], self.routing.facts
        change, active = self.routing.change(given.get("t"))
        if not active:
            return None
        states = torch.cat([output, hidden.to(output)])
        own = [block if len(output) > 1 else 0 for block in range(facts.blocks)]
        kept = range(1, facts.layers + 1)
        mixed = restyled(change[:, active].to(states.device), states, [own[block] for block in active], kept)
        return torch.stack([next(mixed) if block in active else output[own[block]] for block in range(facts.blocks)])
