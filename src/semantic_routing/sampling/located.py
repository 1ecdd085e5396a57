"""Relative paths of a run's configuration, resolved from the folder in which the run was started."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from semantic_routing.data.dataset import DataConfig
from semantic_routing.data.sources.storage import expand, is_url
from semantic_routing.model.codec import CodecConfig
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.toy.worlds import WORLDS

KEY, FOLDER = "origins", "folder"
"""Keys of ``state.json``: the origins of a run's data and models, and within it the folder in which the run started."""
Named = TypeVar("Named", TextEncoderConfig, CodecConfig)


def located(name: str, folder: str | None) -> str:
    """Resolve a relative path from ``folder``, in which the run was started; return anything else unchanged.

    A path that does not exist there is returned unchanged, too: the run may have been moved together with its data.
    """
    if not name or not folder or name in WORLDS or is_url(name) or os.path.isabs(name) or folder == os.getcwd():
        return name
    there = os.path.join(folder, name)
    return there if any(map(os.path.exists, expand(there)[:1])) else name


def located_model(cfg: Named, folder: str | None) -> Named:
    """Resolve the paths in the configuration of a frozen model; a name on the hub stays as it is."""
    names = [name for name in ("name_or_path", "keep_on_disk") if hasattr(cfg, name)]
    moved: dict[str, Any] = {name: located(getattr(cfg, name), folder) for name in names}
    return replace(cfg, **moved)


def located_data(cfg: DataConfig, folder: str | None) -> DataConfig:
    """Resolve the relative paths of a run's data."""
    paths = tuple(located(path, folder) for path in cfg.paths)
    return replace(cfg, paths=paths, index=located(cfg.index, folder), sidecar=located(cfg.sidecar, folder))


def here() -> str:
    """Return the current working directory."""
    return str(Path.cwd())
