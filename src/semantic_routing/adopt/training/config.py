"""AdoptConfig: all settings of ``semroute adopt train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.routing import Injection
from semantic_routing.adopt.weights import REINJECT, Form, check_arm
from semantic_routing.common.sizes import parse_bytes
from semantic_routing.model.arms import DEFAULT_ARM
from semantic_routing.training.config import RunConfig
from semantic_routing.training.optim import OptimConfig

ROUTER_RATE = 1e-2
"""Default learning rate of router numbers."""


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Where texts that have been read are kept; a set that does not fit is read again in every epoch."""

    keep: str = "2GiB"
    """Main memory for texts, such as "2GiB"; "0" keeps none."""
    keep_on_disk: str = ""
    """Folder that keeps texts for later runs, too; none by default."""
    keep_on_disk_bytes: str = "50GiB"
    """Size of that folder from which on nothing is added."""

    def __post_init__(self) -> None:
        parse_bytes(self.keep)
        parse_bytes(self.keep_on_disk_bytes)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A LoRA on the projections of the text, trained after the routing."""

    rank: int = 0
    """Rank of the LoRA; 0 trains none."""
    steps: int = 1000
    """Training steps of the LoRA, after those of the routing."""
    alpha: float | None = None
    """Strength times rank; by default the rank."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.steps < 1:
            raise ValueError(
                f"lora has rank {self.rank} and {self.steps} steps; use rank 0 for none, and 1 step or more"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class AdoptConfig(RunConfig):
    """All settings of a run that trains an adopted pipeline; every checkpoint has a copy."""

    LEAST_IMAGE: ClassVar[int] = 0

    pipeline: Annotated[str, tyro.conf.Positional] = ""
    """Folder of a diffusers pipeline, or its name on the Hugging Face hub."""
    arm: str = DEFAULT_ARM
    """Arm of the routing."""
    weights: Form | None = None
    """Form of the weights; by default simplex for learned arms and gate for fixed ones."""
    injection: Injection = "swap"
    """What is added to a stream of text: swap the difference to the original text, reinject a learned part of it."""
    image_size: int = 0
    """Side of the square training images, in pixels; 0 is the pipeline's own."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(router_lr=ROUTER_RATE, betas=(0.9, 0.99)))
    """The optimiser: router_lr is the rate of the routing, and lr that of the LoRA."""
    scheduler_shift: bool = True
    """Take time.shift from the pipeline's scheduler."""
    steps: int = 1000
    """Training steps of the routing."""
    batch: int = 16
    """Images per step."""
    ema_every: int = 1
    """Steps between updates of the moving average."""
    text: KeepConfig = field(default_factory=KeepConfig)
    """Where texts are kept."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA."""
    compile: bool = False
    """Use torch.compile on the blocks: slower start, faster steps."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, slower steps."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the last step always writes one."""
    preview: Drawing = field(default_factory=lambda: Drawing(batch=4))
    """Sampling of the grids; batch is the number of images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_arm(self.arm) == REINJECT:
            raise ValueError(
                f"arm {REINJECT!r} has nothing to train: load the pipeline and call adopt(pipe, {REINJECT!r})"
            )

    @property
    def last_step(self) -> int:
        return self.steps + (self.lora.steps if self.lora.rank else 0)
