"""Models on the page: a run or a pipeline with its own routing, and a pipeline with a routing put onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.edits import NO_EDITS, RoutingEdits
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.table import row_names as adopted_rows
from semantic_routing.adopt.table import weights_at
from semantic_routing.adopt.training.own_subject import OwnSubject
from semantic_routing.adopt.training.subject import Subject
from semantic_routing.adopt.weights import REINJECT
from semantic_routing.analysis.routers import routes, routing_weights
from semantic_routing.explorer.edits import applied
from semantic_routing.explorer.state import State
from semantic_routing.sampling.routing_file import overridden
from semantic_routing.sampling.samplers import Callback
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.toy.worlds import world_of


@dataclass(frozen=True)
class Version:
    """One way to route a model, whose picture is shown beside those of the others."""

    title: str
    edits: RoutingEdits = NO_EDITS
    """Only adopted models have a scale and gains."""


@dataclass(frozen=True)
class Saved:
    """Edits as a file, and the command that samples with it."""

    name: str
    content: dict[str, Any]
    command: str


class Model(ABC):
    """A model that draws a prompt's picture under several versions of its routing."""

    name: str
    """The path that it was opened from."""
    about: str
    """A sentence on what its blocks read."""
    rows: tuple[str, ...]
    """Names of the rows of weights; empty if the weights cannot be shown or edited."""
    columns: tuple[str, ...]
    """Names of the states that are mixed."""
    depends_on_time: bool
    adopted: bool
    """Whether it has a scale and gains."""
    world: str
    """Name of the drawn world whose checker judges its pictures; empty for none."""
    pixels: tuple[int, int]

    @abstractmethod
    def table(self, time: float) -> Float[np.ndarray, "K L"]:
        """Return the learned weights of all rows at a time."""

    @abstractmethod
    def versions(self, state: State) -> list[Version]:
        """Return the versions that a state compares, the original one first."""

    @abstractmethod
    def draw(
        self, prompt: str, cfg: SampleConfig, version: Version, watch: Callback | None
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Draw a prompt's picture; the noise depends on the seed alone. ``watch`` is called at each step, if it can."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, " B *latent"]) -> UInt8[np.ndarray, "B H W 3"]:
        """Return the pictures of latents."""

    @abstractmethod
    def check(self, state: State) -> None:
        """Raise ValueError unless the model has the rows and columns that a state edits."""

    @abstractmethod
    def saved(self, state: State) -> Saved | None:
        """Return a state's edits as a file; None if nothing is edited."""

    def shown(self, state: State) -> Float[np.ndarray, "K L"]:
        """Return the weights of the state's last version at its time."""
        return applied(state.edit, self.rows, self.table(state.time))


NOISE = [(0, 0)]
"""Prompt index and image index of every picture: the seed alone decides the noise."""


class OwnModel(Model):
    """A run, a checkpoint, or a pipeline of semroute export."""

    adopted = False

    def __init__(self, name: str, bundle: TextToImage) -> None:
        self.name, self.bundle = name, bundle
        cfg = bundle.model.cfg
        editable = routes(bundle.model)
        self.about = f"{cfg.strategy.title}: {cfg.strategy.reads}"
        self.rows = tuple(cfg.rows) if editable else ()
        self.columns = tuple(f"layer {layer}" for layer in range(1, cfg.text_layers + 1)) if editable else ()
        self.depends_on_time = editable and bundle.model.depends_on_time
        self.world = world_of(bundle.config)
        self.pixels = bundle.pixels

    def table(self, time: float) -> Float[np.ndarray, "K L"]:
        return routing_weights(self.bundle.model, [time])[0]

    def versions(self, state: State) -> list[Version]:
        edits = RoutingEdits(override=state.edit)
        return [Version("as learned"), *([] if state.edit is None else [Version("edited", edits)])]

    def check(self, state: State) -> None:
        if state.edit is not None:
            state.edit.check(self.bundle.model.cfg)

    def saved(self, state: State) -> Saved | None:
        if state.edit is None:
            return None
        command = f'semroute sample {self.name} --prompt "..." --routing routing.json --out images'
        return Saved("routing.json", state.edit.to_json(), command)

    def draw(
        self, prompt: str, cfg: SampleConfig, version: Version, watch: Callback | None
    ) -> UInt8[np.ndarray, "H W 3"]:
        with overridden(self.bundle.model, version.edits.override):
            return self.bundle.sample([prompt], NOISE, cfg, watch)[0].numpy(force=True)

    def decode(self, latents: Float[Tensor, " B *latent"]) -> UInt8[np.ndarray, "B H W 3"]:
        return self.bundle.codec.decode(latents).numpy(force=True)


class AdoptedModel(Model):
    """A pipeline with the results of semroute adopt train. Column 0 of its weights is the original state."""

    adopted = True

    def __init__(self, name: str, pipeline: str, subject: Subject, routing: Routing, config: dict[str, Any]) -> None:
        self.name, self.pipeline, self.subject, self.routing = name, pipeline, subject, routing
        facts = routing.facts
        self.about = f"{facts.transformer} with a routing of arm {facts.arm}; column 0 is {facts.origin}"
        self.rows = () if facts.arm == REINJECT else tuple(adopted_rows(facts))
        self.columns = ("original", *(f"layer {layer}" for layer in range(1, facts.layers + 1)))
        self.depends_on_time = routing.depends_on_time
        self.world = world_of(config)
        self.pixels = subject.pixels

    def table(self, time: float) -> Float[np.ndarray, "K L"]:
        return weights_at(self.routing, [time])[0].numpy(force=True)

    def shown(self, state: State) -> Float[np.ndarray, "K L"]:
        table = torch.from_numpy(np.array(self.table(state.time)))[None]
        return edits_of(state).of_weights(self.rows)(table)[0].numpy()

    def versions(self, state: State) -> list[Version]:
        found = [Version("without routing", RoutingEdits(scale=0.0)), Version("with routing")]
        edits = edits_of(state)
        return found if edits == NO_EDITS else [*found, Version("edited", edits)]

    def check(self, state: State) -> None:
        edits_of(state).check(self.routing.facts)

    def saved(self, state: State) -> Saved | None:
        edits = edits_of(state)
        if edits == NO_EDITS:
            return None
        command = f"semroute adopt sample {self.pipeline} --routing {self.name} --edits edits.json"
        return Saved("edits.json", edits.to_json(), f'{command} --prompt "..." --out images')

    def draw(
        self, prompt: str, cfg: SampleConfig, version: Version, watch: Callback | None
    ) -> UInt8[np.ndarray, "H W 3"]:
        with version.edits.on(self.routing):
            if isinstance(self.subject, OwnSubject):
                return self.subject.bundle.sample([prompt], NOISE, cfg, watch)[0].numpy(force=True)
            settings = Drawing(steps=cfg.steps, guidance=cfg.guidance, seed=cfg.seed)
            return self.subject.sample([prompt], NOISE, settings)[0].numpy(force=True)

    def decode(self, latents: Float[Tensor, " B *latent"]) -> UInt8[np.ndarray, "B H W 3"]:
        return self.subject.codec.decode(latents).numpy(force=True)


def edits_of(state: State) -> RoutingEdits:
    """Return a state's edits of an adopted routing."""
    return RoutingEdits(override=state.edit, gains=tuple(sorted(state.gains.items())), scale=state.scale)


def check_alike(first: Model, other: Model) -> None:
    """Raise ValueError if two models cannot start from the same noise."""
    if first.pixels != other.pixels:
        sizes = " and ".join(f"{width} x {height}" for height, width in (first.pixels, other.pixels))
        raise ValueError(f"{first.name} and {other.name} draw {sizes} pixels: models side by side need one size")
