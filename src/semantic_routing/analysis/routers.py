"""Reads a router without its backbone from a run, a checkpoint or an exported pipeline, and returns its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
"""The 21 times of Figures 3, 8 and 9 (0 noise, 1 data)."""
CHOSEN_TIMES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Default times of Figures 2 and 7."""
TIME = "time t (0 noise, 1 data)"
"""Label of the time axis."""


def open_router(path: Path) -> Backbone:
    """Return the model of a run, checkpoint or exported pipeline on the meta device, with its router's EMA weights.

    Only the router is loaded, so this takes little time and memory for any backbone. ValueError for other folders.
    """
    sizes, found, source = _of_pipeline(path) if (path / PIPELINE).is_file() else _of_checkpoint(path)
    with torch.device("meta"):
        model = make_model(sizes)
    if not isinstance(model, DiT):
        return model
    wanted = {name: tensor.shape for name, tensor in model.router.state_dict().items()}
    if {name: tensor.shape for name, tensor in found.items()} != wanted:
        raise ValueError(f"{source} does not hold the router of its configuration, arm {sizes.arm!r}")
    model.router.load_state_dict(found, assign=True)
    return model


Opened = tuple[DiTConfig, dict[str, Tensor], Path]
"""Sizes of a model, the tensors of its router, and their file or folder."""


def _of_checkpoint(path: Path) -> Opened:
    folder = find_checkpoint(path)
    config = read_state(folder).get("config")
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{folder} was not written by semroute train: its state.json has no configuration")
    sizes, file = from_dict(DiTConfig, config["model"], "model."), folder / EMA
    return sizes, {name.removeprefix("router."): x for name, x in read_tensors(file, "router.").items()}, file


def _of_pipeline(path: Path) -> Opened:
    folder, prefix = path / "transformer", "backbone.router."
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = DiTConfig(**{field.name: config[field.name] for field in fields(DiTConfig)})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not a transformer of semroute export: bad config.json ({error})") from error
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file), safe_open(file, "pt") as content:
            names = [name for name in content.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name.removeprefix(prefix): content.get_tensor(name) for name in names}
    return sizes, found, folder


def routes(model: Backbone) -> bool:
    """Return whether a model has routing weights that do not depend on the prompt."""
    return model.cfg.strategy.has_weights


@torch.no_grad()
def routing_weights(model: Backbone, times: Sequence[float]) -> Float[np.ndarray, "T K L"]:
    """Return the weight of each of L layers in each of K rows at the times (0 noise, 1 data): [T, K, L]; rows sum to 1.

    The rows are the blocks, or the parts of all blocks if a block reads several mixes (``DiTConfig.rows``). Weights are
    repeated along an axis on which they do not depend. ValueError for FuseDiT, which has no router.
    """
    if not isinstance(model, DiT):
        raise ValueError(
            "FuseDiT has no router: each of its blocks reads one fixed layer of the language model, so there are "
            "no routing weights to show"
        )
    device = next((p.device for p in model.router.parameters()), None)
    t = torch.tensor(times, dtype=torch.float32, device=device)
    return model.router.weights(t).expand(len(times), len(model.cfg.rows), -1).numpy(force=True)


def row_names(cfg: DiTConfig) -> list[str]:
    """Return the names of the rows for an axis called ``row_label``: a block's number, or "3, head 1, values"."""
    return [row.removeprefix("block ") for row in cfg.rows]


def row_label(cfg: DiTConfig) -> str:
    """Return the name of the axis of rows."""
    return ", ".join(["block", *["head"] * cfg.strategy.by_head, *["keys or values"] * cfg.strategy.by_side])
