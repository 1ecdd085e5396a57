"""Builds the network of any arm."""

from __future__ import annotations

from semantic_routing.model.dit import Backbone, DiT, DiTConfig
from semantic_routing.model.fusedit import FuseDiT


def make_model(cfg: DiTConfig) -> Backbone:
    """Return a new network for ``cfg``: a ``FuseDiT`` for the arm "fusedit", else a ``DiT``."""
    return FuseDiT(cfg) if cfg.strategy.reads_keys else DiT(cfg)
