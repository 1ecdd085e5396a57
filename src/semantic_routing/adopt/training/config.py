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
"""Default learning rate of the routing."""


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """Where encoded captions are cached; if they do not fit, they are encoded again in every epoch."""

    keep: str = "2GiB"
    """Main memory for caching encoded captions, such as "2GiB"; "0" turns the cache off."""
    keep_on_disk: str = ""
    """Folder in which encoded captions are also cached for later runs; none by default."""
    keep_on_disk_bytes: str = "50GiB"
    """Maximum size of that folder; once it is reached, nothing more is added."""

    def __post_init__(self) -> None:
        parse_bytes(self.keep)
        parse_bytes(self.keep_on_disk_bytes)


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A LoRA on the projections of the text, which is trained after the routing."""

    rank: int = 0
    """Rank of the LoRA; 0 trains no LoRA."""
    steps: int = 1000
    """Training steps of the LoRA, after those of the routing."""
    alpha: float | None = None
    """The LoRA's alpha, its strength times its rank; by default the rank."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.steps < 1:
            raise ValueError(
                f"lora has rank {self.rank} and {self.steps} steps; use rank 0 for none, and 1 step or more"
            )
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class AdoptConfig(RunConfig):
    """All settings of a run that trains an adopted pipeline; every checkpoint holds a copy."""

    LEAST_IMAGE: ClassVar[int] = 0

    pipeline: Annotated[str, tyro.conf.Positional] = ""
    """Folder of a diffusers pipeline, or its name on the Hugging Face hub."""
    arm: str = DEFAULT_ARM
    """Routing strategy."""
    weights: Form | None = None
    """How the weights are parameterised; by default simplex for learned arms and gate for fixed ones."""
    injection: Injection = "swap"
    """Only for blocks that update the text. What is added to a block's text: swap adds the difference from the
    original text, reinject a learned part of the routed text."""
    image_size: int = 0
    """Side of the square training images, in pixels; 0 means the pipeline's own size."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(router_lr=ROUTER_RATE, betas=(0.9, 0.99)))
    """The optimiser: router_lr is the learning rate of the routing, and lr that of the LoRA."""
    scheduler_shift: bool = True
    """Take time.shift from the pipeline's scheduler."""
    steps: int = 1000
    """Training steps of the routing."""
    batch: int = 16
    """Images per step."""
    ema_every: int = 1
    """Steps between updates of the exponential moving average."""
    text: KeepConfig = field(default_factory=KeepConfig)
    """Where encoded captions are cached."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """The LoRA."""
    compile: bool = False
    """Use torch.compile on the blocks: slower start, faster steps."""
    gradient_checkpointing: bool = False
    """Recompute the blocks in the backward pass: less memory, slower steps."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the last step always writes one."""
    preview: Drawing = field(default_factory=lambda: Drawing(batch=4))
    """Sampling settings of the sample grids; batch is the number of images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_arm(self.arm) == REINJECT:
            raise ValueError(
                f"arm {REINJECT!r} has nothing to train: load the pipeline and call adopt(pipe, {REINJECT!r})"
            )

    @property
    def last_step(self) -> int:
        return self.steps + (self.lora.steps if self.lora.rank else 0)
