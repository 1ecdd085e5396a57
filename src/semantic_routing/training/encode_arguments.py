"""Arguments of ``semroute data encode``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from semantic_routing.model.arms import DEFAULT_ARM


@dataclass(frozen=True, kw_only=True)
class EncodeArguments:
    """Encode a run's captions beforehand, into the folder that its text.keep_on_disk names."""

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, a configuration (config.json), or a recipe."""
    arm: str = DEFAULT_ARM
    """Arm of a recipe."""
    text: str = ""
    """Text encoder instead of the run's: text.name_or_path."""
    keep_on_disk: str = ""
    """Folder of the states, if the run does not name one."""
    keep_on_disk_bytes: str = ""
    """Most bytes in it, if not the run's."""
    steps: int = 0
    """Steps whose captions are read, where a world that is drawn has no end; by default the run's."""
    batch: int = 256
    """Captions encoded together."""
    device: str = ""
    """auto, cpu, cuda, ...; by default the run's."""
    size_only: bool = False
    """Report the size and encode nothing."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.steps < 0:
            raise ValueError(f"batch is {self.batch} and steps {self.steps}; expected at least 1, and at least 0")
