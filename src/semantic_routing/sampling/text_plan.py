"""TextPlan: the text of a batch of prompts at any time, prepared as seldom as routing allows."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from semantic_routing.model.context import TextContext
from semantic_routing.sampling.clock import Clock
from semantic_routing.text.features import TextFeatures

PLANNED_BYTES = 2**28
"""Most memory for the text of steps to come."""


class TextPlan:
    """Prepares prompts for a network: once, ahead for several steps, or at every step, as its arm needs.

    Once where routing ignores time. Where it follows a time that is known beforehand, for as many of ``times`` at once
    as fit ``PLANNED_BYTES``: the states are then read once for all of these steps. At every step where it estimates the
    time from the latents, or the times are not known.
    """

    def __init__(
        self,
        model: Any,
        features: TextFeatures,
        *,
        clock: Clock | None = None,
        times: Float[Tensor, " T"] | None = None,
    ) -> None:
        """Plan for ``model``, a ``Backbone`` or a diffusers transformer around one.

        ``clock`` turns the nominal time into the one that gates are told. ``times`` are those that will be asked for.
        """
        self.model, self.features, self.clock = model, features, clock
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
        told = t if self.clock is None else self.clock(t)
        return self.model.prepare_text(self.features, told if x is None else self.model.gate_time(x, told))

    def _planned(self, t: Float[Tensor, " 1"]) -> TextContext:
        """The text at a time of ``times``, prepared together with that of the times after it."""
        time = t.item()
        if time not in self._ready:
            first = self._times.index(time) if time in self._times else len(self._times)
            steps = self._times[first : first + self._steps_at_once()]
            if len(steps) < 2:
                return self._prepare(None, t)
            told = t.new_tensor(steps)
            contexts = self.model.prepare_steps(self.features, told if self.clock is None else self.clock(told))
            self._ready = dict(zip(steps, contexts, strict=True))
        return self._ready[time]

    def _steps_at_once(self) -> int:
        """Number of steps whose keys and values, and what they are made from, fit ``PLANNED_BYTES``."""
        cfg = self.model.cfg
        mixes = cfg.depth if cfg.strategy.by_block else 1
        channels = mixes * cfg.text_width + 2 * cfg.depth * cfg.kv_heads * cfg.head_dim
        return PLANNED_BYTES // (self.features.mask.numel() * channels * self.features.hidden.itemsize)
