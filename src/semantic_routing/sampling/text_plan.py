"""TextPlan: the text context of a batch of prompts at any time, prepared as rarely as the routing allows."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from semantic_routing.model.context import TextContext
from semantic_routing.sampling.clock import Clock
from semantic_routing.text.features import TextFeatures

PLANNED_BYTES = 2**28
"""Default limit on the memory of text that is prepared ahead."""


class TextPlan:
    """Prepares the text of prompts for a network, as often as its arm needs.

    * Once, if routing does not depend on time.
    * For several of ``times`` together, if routing depends on time: as many as fit into ``budget`` bytes. The hidden
      states are then read once for all of these steps.
    * At every step, if ``times`` are not known or routing estimates the time from the latents.
    """

    def __init__(
        self,
        model: Any,
        features: TextFeatures,
        *,
        clock: Clock | None = None,
        times: Float[Tensor, " T"] | None = None,
        budget: int = PLANNED_BYTES,
    ) -> None:
        """Plan for ``model``, a ``Backbone`` or a diffusers transformer around one.

        ``clock`` maps the nominal time to the gate time. ``times`` are all times that ``at`` will be called with.
        """
        self.model, self.features, self.clock, self.budget = model, features, clock, budget
        known = times is not None and model.depends_on_time and not model.reads_latents
        self._times: list[float] = times.tolist() if known and times is not None else []
        self._ready: dict[float, TextContext] = {}
        self._once: TextContext | None = None

    def at(self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T_or_B"]) -> TextContext:
        """Return the text that the blocks read at the latents ``x`` and the time ``t``."""
        if not self.model.depends_on_time:
            if self._once is None:
                self._once = self.model.prepare_text(self.features)
            return self._once
        return self._planned(t) if self._times else self._prepare(x, t)

    def _prepare(self, x: Tensor | None, t: Tensor) -> TextContext:
        gate = t if self.clock is None else self.clock(t)
        return self.model.prepare_text(self.features, gate if x is None else self.model.gate_time(x, gate))

    def _planned(self, t: Float[Tensor, " 1"]) -> TextContext:
        """Return the text at one of ``times``, prepared together with the text at the times after it."""
        time = t.item()
        if time not in self._ready:
            first = self._times.index(time) if time in self._times else len(self._times)
            steps = self._times[first : first + self._steps_at_once()]
            if len(steps) < 2:
                return self._prepare(None, t)
            gate = t.new_tensor(steps)
            contexts = self.model.prepare_steps(self.features, gate if self.clock is None else self.clock(gate))
            self._ready = dict(zip(steps, contexts, strict=True))
        return self._ready[time]

    def _steps_at_once(self) -> int:
        """Return the number of steps whose mixed states, keys and values fit ``budget`` bytes."""
        cfg = self.model.cfg
        channels = cfg.mixes * cfg.text_width + 2 * cfg.depth * cfg.kv_heads * cfg.head_dim
        return self.budget // (self.features.mask.numel() * channels * self.features.hidden.itemsize)
