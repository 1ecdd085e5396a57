"""Routing weights from a file, in the place of a model's own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from semantic_routing.common.files import read_json
from semantic_routing.model.dit import Backbone, DiT, DiTConfig
from semantic_routing.model.override import RoutingOverride, rerouted


def read_override(path: Path, cfg: DiTConfig) -> RoutingOverride:
    """Read a file of routing weights; ValueError, which names the file, if it does not fit this network."""
    data = read_json(path, "a file of routing weights")
    try:
        override = RoutingOverride.from_json(data)
        override.check(cfg)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return override


def overridden(model: Backbone, override: RoutingOverride | None) -> AbstractContextManager[None]:
    """Return a context in which the network reads the override's weights; without one, nothing changes."""
    if override is None:
        return nullcontext()
    assert isinstance(model, DiT)  # checked when the file was read
    return rerouted(model, override.router(model.cfg, model.router))
