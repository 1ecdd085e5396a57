"""Relative paths of a run's configuration, as they were meant in the folder where the run was started."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from semantic_routing.data.sources.discover import SHAPES
from semantic_routing.data.sources.storage import expand, is_url
from semantic_routing.model.codec import CodecConfig
from semantic_routing.text.config import TextEncoderConfig

KEY, FOLDER = "origins", "folder"
"""Where ``state.json`` keeps them, and among them the folder in which the run was started."""
Named = TypeVar("Named", TextEncoderConfig, CodecConfig)


def located(name: str, folder: str | None) -> str:
    """A relative path as it was meant in the folder where the run was started; all else as it is.

    Where that folder is gone, or holds nothing of that name while this one does, the whole may have moved.
    """
    if not name or not folder or name == SHAPES or is_url(name) or os.path.isabs(name) or folder == os.getcwd():
        return name
    there = os.path.join(folder, name)
    return there if any(map(os.path.exists, expand(there)[:1])) else name


def located_model(cfg: Named, folder: str | None) -> Named:
    """The configuration of a frozen model with its path as it was meant; a name on the hub stays."""
    names = [name for name in ("name_or_path", "keep_on_disk") if hasattr(cfg, name)]
    moved: dict[str, Any] = {name: located(getattr(cfg, name), folder) for name in names}
    return replace(cfg, **moved)


def here() -> str:
    """The folder that relative paths are taken from now."""
    return str(Path.cwd())
