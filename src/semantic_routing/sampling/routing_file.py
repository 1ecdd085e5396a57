"""Routing weights from a file, in place of a model's own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from semantic_routing.common.files import read_json
from semantic_routing.model.dit import Backbone, DiT, DiTConfig
from semantic_routing.model.override import RoutingOverride, rerouted


def read_override(path: Path, cfg: DiTConfig) -> RoutingOverride:
    """Read a file of routing weights; raise ValueError, which names the file, if they do not fit this network."""
    data = read_json(path, "a file of routing weights")
    try:
        override = RoutingOverride.from_json(data)
        override.check(cfg)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return override


def overridden(model: Backbone, override: RoutingOverride | None) -> AbstractContextManager[None]:
    """Return a context in which ``model`` uses the weights of ``override``; with None, nothing changes.

    ``model`` is the network, ``TextToImage.model``. Raises ValueError if rows or layers do not match the network.
    """
    if override is None:
        return nullcontext()
    override.check(model.cfg)
    assert isinstance(model, DiT)  # all arms with rows are
    return rerouted(model, override.router(model.cfg, model.router))
