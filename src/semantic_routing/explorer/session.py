"""Drawing for the page: all pictures of a state, step by step, from the same noise, kept while they are needed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.analysis.trajectory import effective_time, squared_error
from semantic_routing.explorer.models import Model, Version
from semantic_routing.explorer.state import State, check_prompt
from semantic_routing.explorer.streamed import streamed
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.toy.captions import Sample
from semantic_routing.toy.checker import Verdict, check
from semantic_routing.toy.claims import Claim
from semantic_routing.toy.parsing import parse_claims
from semantic_routing.toy.worlds import WORLDS

PREVIEW_STEPS = 6
"""Steps of a picture that is redrawn while a weight is dragged."""
FRAMES = 8
"""Estimates of the picture that are shown while it is drawn."""
KEPT = 64
"""Pictures that are kept."""

Image = UInt8[np.ndarray, "H W 3"]


@dataclass(frozen=True)
class Frame:
    """The model's estimate of the picture at the beginning of a step, x + (1 - t) v."""

    step: int
    time: float
    image: Image


@dataclass(frozen=True)
class Picture:
    """A picture, finished or on its way."""

    frames: tuple[Frame, ...] = ()
    image: Image | None = None
    """The finished picture."""
    times: Float[np.ndarray, " S"] | None = None
    """Nominal times of the steps, of a finished picture whose steps can be seen."""
    effective: Float[np.ndarray, " S"] | None = None
    """Effective time of the trajectory at each of them (``analysis/trajectory.py``)."""


@dataclass(frozen=True)
class Pane:
    """One of the pictures that stand side by side."""

    model: Model
    version: Version
    cfg: SampleConfig
    picture: Picture | None = None
    """None before it is drawn."""


class Session:
    """The models of a page and the pictures that were drawn last; one caller draws at a time."""

    def __init__(self, models: Sequence[Model], seed: int = 0, examples: int = 24) -> None:
        """The first model's routing can be edited; the others are drawn beside it."""
        self.models = list(models)
        self.examples: list[Sample] = []
        if world := self.models[0].world:
            self.examples = WORLDS[world].prompts(seed, examples)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, ...], Picture] = OrderedDict()

    def draw(self, state: State) -> Iterator[list[Pane]]:
        """Yield the panes of a state each time that one of them has changed; ValueError for a bad prompt."""
        prompt = check_prompt(state.prompt)
        panes = self.panes(state)
        for place, pane in enumerate(panes):
            for picture in self._pictures(prompt, pane):
                panes[place] = replace(pane, picture=picture)
                yield list(panes)

    def preview(self, state: State) -> Iterator[list[Pane]]:
        """Yield the panes with the last one of the first model in few steps, the others as they were drawn before."""
        prompt = check_prompt(state.prompt)
        panes, changed = self.panes(state), len(self.models[0].versions(state)) - 1
        few = state.sampling(min(PREVIEW_STEPS, state.steps))
        for place, pane in enumerate(panes):
            if place == changed or self._kept.get(_key(prompt, pane)) is None:
                panes[place] = replace(pane, cfg=few)
            for picture in self._pictures(prompt, panes[place]):
                panes[place] = replace(panes[place], picture=picture)
        yield panes

    def panes(self, state: State) -> list[Pane]:
        """Return the panes of a state without pictures."""
        first, *others = self.models
        found = [Pane(first, version, state.sampling()) for version in first.versions(state)]
        plain = replace(state, edit=None, scale=1.0, gains={})
        return found + [Pane(model, model.versions(plain)[-1], state.sampling()) for model in others]

    def _pictures(self, prompt: str, pane: Pane) -> Iterator[Picture]:
        """Yield a picture as it emerges; at once if it was drawn before."""
        key = _key(prompt, pane)
        if key in self._kept:
            self._kept.move_to_end(key)
            yield self._kept[key]
            return
        with self._lock:  # versions change the model while they are drawn
            reports: Iterator[Picture] = streamed(partial(_draw, prompt, pane))
            for picture in reports:
                yield picture
                if picture.image is not None:
                    self._kept[key] = picture
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def claims(self, prompt: str) -> tuple[Claim, ...] | None:
        """Return what the checker tests a prompt's picture for; None if it cannot judge it."""
        if not self.models[0].world:
            return None
        known = {sample.caption: sample.claims for sample in self.examples}
        return known.get(prompt.strip()) or parse_claims(prompt)

    def verdict(self, prompt: str, pane: Pane) -> Verdict | None:
        """Return the checker's verdict on a finished picture; None if it cannot judge it."""
        claims = self.claims(prompt)
        if claims is None or not pane.model.world or pane.picture is None or pane.picture.image is None:
            return None
        return check(pane.picture.image, claims)


def _key(prompt: str, pane: Pane) -> tuple[object, ...]:
    return pane.model.name, prompt, pane.cfg, replace(pane.version, title="")


def _draw(prompt: str, pane: Pane, report: Callable[[Picture], None]) -> None:
    """Draw a picture and report it about ``FRAMES`` times on the way, and when it is finished."""
    frames: list[Frame] = []
    states: list[Tensor] = []
    times: list[float] = []
    every = -(-pane.cfg.steps // FRAMES)

    def watch(step: int, t: Tensor, x: Tensor, v: Tensor) -> None:
        estimate = x + (1 - t).to(x.device) * v
        states[step:] = [x.float().cpu(), estimate.float().cpu()]  # every sampler ends at its last estimate
        times.append(float(t))
        if step % every == 0:
            frames.append(Frame(step, float(t), pane.model.decode(estimate)[0]))
            report(Picture(tuple(frames)))

    with torch.no_grad():
        image = pane.model.draw(prompt, pane.cfg, pane.version, watch)
    report(Picture(tuple(frames), image, *_measured(states, times)))


def _measured(
    states: list[Tensor], times: list[float]
) -> tuple[Float[np.ndarray, " S"] | None, Float[np.ndarray, " S"] | None]:
    """Return nominal and effective times of a trajectory's steps; ``states`` also holds the final latents.

    None for a pipeline whose steps cannot be seen.
    """
    if not times:
        return None, None
    errors = np.stack([squared_error(x, states[-1]) for x in states[:-1]])
    return np.array(times), effective_time(errors, errors[0])[:, 0]
