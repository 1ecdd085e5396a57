"""Models on the page: a run or a pipeline with its own routing, and a pipeline with a routing put onto it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.table import row_names as adopted_rows
from semantic_routing.adopt.table import weights_at
from semantic_routing.adopt.training.own_subject import OwnSubject
from semantic_routing.adopt.training.subject import Subject
from semantic_routing.analysis.routers import routes, routing_weights
from semantic_routing.explorer.edits import applied, with_gains
from semantic_routing.explorer.state import State
from semantic_routing.model.override import RoutingOverride
from semantic_routing.sampling.routing_file import overridden
from semantic_routing.sampling.samplers import Callback
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.toy.worlds import WORLDS


@dataclass(frozen=True)
class Version:
    """One way to route a model, whose picture is shown beside those of the others."""

    title: str
    edit: RoutingOverride | None = None
    scale: float = 1.0
    gains: tuple[tuple[int, float], ...] = ()


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

    def check(self, edit: RoutingOverride) -> None:
        """Raise ValueError unless the model has these rows and columns."""
        if unknown := [name for name in edit.rows if name not in self.rows]:
            raise ValueError(f"{self.name} has no row {unknown[0]!r} to edit")
        if len(edit.weights[0]) != len(self.columns):
            raise ValueError(f"rows have {len(edit.weights[0])} weights, but {self.name} mixes {len(self.columns)}")

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
        return [Version("as learned"), *([] if state.edit is None else [Version("edited", state.edit)])]

    def draw(
        self, prompt: str, cfg: SampleConfig, version: Version, watch: Callback | None
    ) -> UInt8[np.ndarray, "H W 3"]:
        with overridden(self.bundle.model, version.edit):
            return self.bundle.sample([prompt], NOISE, cfg, watch)[0].numpy(force=True)

    def decode(self, latents: Float[Tensor, " B *latent"]) -> UInt8[np.ndarray, "B H W 3"]:
        return self.bundle.codec.decode(latents).numpy(force=True)


class AdoptedModel(Model):
    """A pipeline with the results of semroute adopt train. Column 0 of its weights is the original state."""

    adopted = True

    def __init__(self, name: str, subject: Subject, routing: Routing, config: dict[str, Any]) -> None:
        self.name, self.subject, self.routing = name, subject, routing
        facts = routing.facts
        self.about = f"{facts.transformer} with a routing of arm {facts.arm}; column 0 is {facts.origin}"
        self.rows = tuple(adopted_rows(facts))
        self.columns = ("original", *(f"layer {layer}" for layer in range(1, facts.layers + 1)))
        self.depends_on_time = routing.depends_on_time
        self.world = world_of(config)
        self.pixels = subject.pixels

    def table(self, time: float) -> Float[np.ndarray, "K L"]:
        return weights_at(self.routing, [time])[0].numpy(force=True)

    def shown(self, state: State) -> Float[np.ndarray, "K L"]:
        return with_gains(state.gains, super().shown(state))

    def versions(self, state: State) -> list[Version]:
        changed = Version("edited", state.edit, state.scale, tuple(state.gains.items()))
        alike = (state.edit, state.scale, changed.gains) == (None, 1.0, ())
        return [Version("without routing", scale=0.0), Version("with routing"), *([] if alike else [changed])]

    def draw(
        self, prompt: str, cfg: SampleConfig, version: Version, watch: Callback | None
    ) -> UInt8[np.ndarray, "H W 3"]:
        self.routing.scale = version.scale
        edit = None if version.edit is None and not version.gains else self._edit(version)
        with nullcontext() if edit is None else self.routing.edited(edit):
            if isinstance(self.subject, OwnSubject):
                return self.subject.bundle.sample([prompt], NOISE, cfg, watch)[0].numpy(force=True)
            settings = Drawing(steps=cfg.steps, guidance=cfg.guidance, seed=cfg.seed)
            return self.subject.sample([prompt], NOISE, settings)[0].numpy(force=True)

    def _edit(self, version: Version) -> Callable[[Tensor], Tensor]:
        def edit(weights: Tensor) -> Tensor:
            tables = [applied(version.edit, self.rows, table) for table in weights.numpy(force=True)]
            return torch.from_numpy(with_gains(dict(version.gains), np.stack(tables))).to(weights)

        return edit

    def decode(self, latents: Float[Tensor, " B *latent"]) -> UInt8[np.ndarray, "B H W 3"]:
        return self.subject.codec.decode(latents).numpy(force=True)


def world_of(config: dict[str, Any]) -> str:
    """Return the name of the drawn world on which a run was trained; an empty string for other data."""
    paths = config.get("data", {}).get("paths", ())
    return next((name for name in WORLDS if name in paths), "")


def check_alike(first: Model, other: Model) -> None:
    """Raise ValueError if two models cannot start from the same noise."""
    if first.pixels != other.pixels:
        sizes = " and ".join(f"{width} x {height}" for height, width in (first.pixels, other.pixels))
        raise ValueError(f"{first.name} and {other.name} draw {sizes} pixels: models side by side need one size")
