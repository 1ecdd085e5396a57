"""State of the page: everything that decides the pictures, as a link that reproduces them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from semantic_routing.common.config import nearest
from semantic_routing.explorer.edits import MOST_GAIN
from semantic_routing.model.override import RoutingOverride
from semantic_routing.sampling.samplers import SAMPLERS
from semantic_routing.sampling.text_to_image import SampleConfig

MOST_STEPS = 200
MOST_SCALE = 5
"""Largest strength of an adopted routing."""
MOST_CHARACTERS = 4000
"""Longest prompt that is drawn; captions of hundreds of words pass."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Settings of the page."""

    prompt: str = ""
    seed: int = 0
    steps: int = 50
    guidance: float = 3.0
    sampler: str = "euler"
    shift: float = 1.0
    time: float = 0.5
    """Time at which the weights of gates are shown; it does not change the pictures."""
    edit: RoutingOverride | None = None
    scale: float = 1.0
    """Strength of an adopted routing."""
    gains: Mapping[int, float] = field(default_factory=dict)
    """Factors on the layers of an adopted routing, for those that differ from 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"the seed is {self.seed}; it must be from 0 to {2**31 - 1}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"there are {self.steps} steps; the page draws with 1 to {MOST_STEPS}")
        if not 0 <= self.time <= 1:
            raise ValueError(f"the time is {self.time:g}; it must be from 0 (noise) to 1 (data)")
        if not abs(self.scale) <= MOST_SCALE:
            raise ValueError(f"the scale is {self.scale:g}; it must be from {-MOST_SCALE} to {MOST_SCALE}")
        if any(layer < 1 or not 0 <= gain <= MOST_GAIN for layer, gain in self.gains.items()):
            raise ValueError(f"gains are for layers from 1 on, and from 0 to {MOST_GAIN}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {self.sampler!r}; {nearest(self.sampler, list(SAMPLERS))}")
        self.sampling()

    def sampling(self, steps: int | None = None) -> SampleConfig:
        """Return the settings of sampling, with another number of steps if it is given."""
        return SampleConfig(
            steps=steps or self.steps,
            guidance=self.guidance,
            sampler=self.sampler,  # type: ignore[arg-type]  # checked above
            shift=self.shift,
            seed=self.seed,
        )


def to_query(state: State) -> str:
    """Return the state as the query of a link; settings of sampling are always named, the rest if it is not empty."""
    found: dict[str, Any] = {"prompt": state.prompt}
    found |= {name: getattr(state, name) for name in ("seed", "steps", "guidance", "sampler", "shift", "time")}
    if state.edit is not None:
        found["edit"] = json.dumps(state.edit.to_json(), separators=(",", ":"))
    if state.scale != 1:
        found["scale"] = state.scale
    if state.gains:
        found["gains"] = json.dumps({str(layer): gain for layer, gain in state.gains.items()}, separators=(",", ":"))
    return urlencode(found)


def from_query(query: Mapping[str, str], default: State) -> State:
    """Return the state of a link's query; ValueError, which names the parameter, if it has wrong values.

    What the query does not name is the default's. Unknown parameters are left alone: other programs add theirs to
    links.
    """
    kinds = {"seed": int, "steps": int, "guidance": float, "shift": float, "time": float, "scale": float}
    found: dict[str, Any] = {name: query[name] for name in ("prompt", "sampler") if name in query}
    for name in ("edit", "gains", *kinds):
        if name in query:
            found[name] = _value(name, query[name], kinds.get(name))
    return replace(default, **found)


def _value(name: str, text: str, kind: type | None) -> Any:
    try:
        if kind is not None:
            return kind(text)
        data = json.loads(text)
        return RoutingOverride.from_json(data) if name == "edit" else {int(k): float(v) for k, v in data.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"this link has a bad {name} ({error}): copy the whole link again") from error


def check_prompt(prompt: str) -> str:
    """Return a prompt without spaces around it; ValueError if there is nothing to draw or too much."""
    text = prompt.strip()
    if not text:
        raise ValueError("Type a prompt first, such as: a red circle left of a blue square")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"The prompt has {len(text):,} characters; at most {MOST_CHARACTERS:,} are drawn: shorten it")
    return text
