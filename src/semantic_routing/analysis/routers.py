"""A router alone, read from a run, a checkpoint or an exported pipeline, and its weights at any time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from semantic_routing.checkpoint.load import EMA, find_checkpoint, read_state, read_tensors
from semantic_routing.checkpoint.safetensors_storage import open_tensors
from semantic_routing.common.config import from_dict
from semantic_routing.interop.open import PIPELINE
from semantic_routing.model.build import make_model
from semantic_routing.model.dit import Backbone, DiT, DiTConfig

TIMES = tuple(float(t) for t in np.linspace(0, 1, 21).round(2))
"""The 21 times of Figures 3, 8 and 9 (0 noise, 1 data) ..."""
CHOSEN_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""... and those of Figures 2 and 7, unless others are chosen."""
TIME = "time t (0 noise, 1 data)"
"""The name of the axis."""


def open_router(path: Path) -> Backbone:
    """The model of a run, checkpoint or exported pipeline, on the meta device but for its router's averaged weights.

    Nothing else is read, so this is quick and small for any backbone. ValueError for what is none of them.
    """
    sizes, tensors, source = _of_pipeline(path) if (path / PIPELINE).is_file() else _of_checkpoint(path)
    with torch.device("meta"):
        model = make_model(sizes)
    if not isinstance(model, DiT):
        return model
    found = tensors()
    wanted = {name: tensor.shape for name, tensor in model.router.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        raise ValueError(f"{source} does not hold the router of its configuration, arm {sizes.arm!r}")
    model.router.load_state_dict(found, assign=True)
    return model


Opened = tuple[DiTConfig, Callable[[], dict[str, Tensor]], Path]
"""Sizes of a model, what reads its router's tensors, and where from."""


def _of_checkpoint(path: Path) -> Opened:
    folder = find_checkpoint(path)
    config = read_state(folder).get("config")
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{folder} was not written by semroute train: its state.json has no configuration")
    file = folder / EMA

    def tensors() -> dict[str, Tensor]:
        return {name.removeprefix("router."): tensor for name, tensor in read_tensors(file, "router.").items()}

    return from_dict(DiTConfig, config["model"], "model."), tensors, file


def _of_pipeline(path: Path) -> Opened:
    folder, prefix = path / "transformer", "backbone.router."
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = DiTConfig(**{field.name: config[field.name] for field in fields(DiTConfig)})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no transformer of semroute export: its config.json lacks {error}") from error

    def tensors() -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with open_tensors(file), safe_open(file, "pt") as content:
                names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118
                found |= {name.removeprefix(prefix): content.get_tensor(name) for name in names}
        return found

    return sizes, tensors, folder


def routes(model: Backbone) -> bool:
    """Whether a model has routing weights that no text is needed for."""
    return model.cfg.strategy.has_weights


@torch.no_grad()
def routing_weights(model: Backbone, times: Sequence[float]) -> Float[np.ndarray, "T D L"]:
    """Weight of each of L layers in each of D blocks at the times (0 noise, 1 data); each row sums to 1.

    What a router ignores is repeated. ValueError for FuseDiT, which has none.
    """
    if not isinstance(model, DiT):
        raise ValueError(
            "FuseDiT has no router: each of its blocks reads one fixed layer of the language model, so there are "
            "no routing weights to show"
        )
    device = next((p.device for p in model.router.parameters()), None)
    t = torch.tensor(times, dtype=torch.float32, device=device)
    return model.router.weights(t).expand(len(times), model.cfg.depth, -1).numpy(force=True)
