"""Arguments of ``semroute data encode``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from semantic_routing.common.sizes import parse_bytes
from semantic_routing.model.arms import DEFAULT_ARM


def check_room(size: float, most: str, what: str) -> None:
    """Raise ValueError if a folder may not take ``size`` bytes of ``what``."""
    if size > parse_bytes(most):
        raise ValueError(f"{what} are more than --keep-on-disk-bytes {most} allows: raise it")


@dataclass(frozen=True, kw_only=True)
class EncodeArguments:
    """Encode a run's captions, or with --latents its images, before training, into the folder that the run reads.

    Hidden states of captions are cached in the run's folder text.keep_on_disk, latents of images in codec.keep_on_disk.
    """

    run: Annotated[str, tyro.conf.Positional]
    """A run's folder, a configuration (config.json), or a recipe."""
    arm: str = DEFAULT_ARM
    """Routing strategy of the recipe."""
    latents: bool = False
    """Encode the images with the run's VAE, instead of the captions."""
    text: str = ""
    """Text encoder instead of the run's: text.name_or_path."""
    keep_on_disk: str = ""
    """Folder of the cache, if the run does not name one."""
    keep_on_disk_bytes: str = ""
    """Maximum size of the folder, if not the run's."""
    steps: int = 0
    """For generated worlds, which are unlimited: steps whose samples are encoded; by default the run's."""
    batch: int = 256
    """Captions or images encoded together."""
    device: str = ""
    """Device: auto, cpu, cuda, ...; by default the run's."""
    size_only: bool = False
    """Report the size, but encode nothing."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.steps < 0:
            raise ValueError(f"batch is {self.batch} and steps {self.steps}; expected at least 1, and at least 0")
        if self.latents and self.text:
            raise ValueError("--text is the encoder of the captions: leave it out with --latents")
