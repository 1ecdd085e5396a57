"""The settings of a training run: those of every run, and all of ``semroute train``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from semantic_routing.data.dataset import DataConfig
from semantic_routing.flow import TimeConfig
from semantic_routing.model.codec import CodecConfig
from semantic_routing.model.dit import DiTConfig
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.text.config import TINY, TextEncoderConfig
from semantic_routing.training.distill import DistillConfig
from semantic_routing.training.optim import OptimConfig
from semantic_routing.training.parallelize import ParallelConfig
from semantic_routing.training.tracking import Service
from semantic_routing.training.validation import ValidationConfig
from semantic_routing.training.watchdog import WatchdogConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every kind of run has."""

    LEAST_IMAGE: ClassVar[int] = 1
    """Smallest ``image_size``."""
    data: DataConfig = field(default_factory=DataConfig)
    """The training data: the toy world, or shards, tables, manifests and folders of images with captions."""
    image_size: int = 256
    """Side of the square training images, in pixels."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    time: TimeConfig = field(default_factory=TimeConfig)
    """The distribution of training times and their weights in the loss."""
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    """When the run counts as hung."""
    steps: int = 500_000
    """Number of training steps."""
    batch: int = 512
    """Global batch size: images per step, of all processes together."""
    accumulate: int = 1
    """Gradient accumulation: microbatches into which each process splits its share of a batch."""
    seed: int = 42
    """Random seed of initial weights, data order, noise, times and prompt dropout."""
    prompt_dropout: float = 0.1
    """Share of dropped prompts, which are replaced by the null prompt."""
    ema_decay: float = 0.99
    """Decay of the exponential moving average of the weights per update; it is reached gradually over the first
    updates."""
    ema_every: int = 100
    """Steps between updates of the exponential moving average."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of matrix products; "auto" is bf16 if the hardware supports it."""
    max_bad_steps: int = 5
    """Number of consecutive steps with a NaN or infinite loss or gradient that stops the run; fewer are skipped and
    counted."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    track: tuple[Service, ...] = ()
    """Services that also receive the metrics: tensorboard (always, if it is installed), wandb, trackio."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2
    """Number of latest checkpoints to keep."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are never deleted; 0 turns this off."""
    preview_every: int = 0
    """Steps between sample grids in the run's samples folder; 0 turns them off."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The loss on held-out images."""
    device: str = "auto"
    """Device: auto, cpu, cuda, cuda:1 or another torch device."""

    @property
    def last_step(self) -> int:
        """The step at which the run ends."""
        return self.steps

    def __post_init__(self) -> None:
        counts = ("steps", "batch", "accumulate", "ema_every", "max_bad_steps", "log_every", "checkpoint_every", "keep")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.image_size < self.LEAST_IMAGE:
            raise ValueError(f"image_size is {self.image_size}; it must be at least {self.LEAST_IMAGE}")
        for name in ("preview_every", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; use 0 for none")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to below 2**63")
        for name in ("prompt_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")

    def share(self, processes: int) -> int:
        """Return each process's number of images per step; ValueError if they do not divide into equal microbatches."""
        if self.batch % (processes * self.accumulate):
            raise ValueError(
                f"a batch of {self.batch} does not divide among {processes} processes with accumulate="
                f"{self.accumulate}; make it a multiple of {processes * self.accumulate}"
            )
        return self.batch // processes


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """All settings of a run. Recipes return complete ones, and every checkpoint holds a copy."""

    minutes: float = 0.0
    """Time limit of the training in minutes. It ends the run if ``steps`` take longer, and the learning rate decays by
    the clock, so that such a run cannot be repeated exactly. 0 for no limit."""
    model: DiTConfig = field(default_factory=DiTConfig)
    """The transformer. Its text width and number of text layers are taken from the text encoder."""
    text: TextEncoderConfig = field(default_factory=lambda: TextEncoderConfig(name_or_path=TINY))
    """The frozen language model; for the name "tiny" a small one is trained first."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """The codec between images and latents."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the run is distributed over the processes of torchrun."""
    null_prompt: str = ""
    """The null prompt: it replaces dropped prompts in training, and classifier-free guidance uses it."""
    compile: bool = False
    """Use torch.compile: on the blocks, on a single CPU on the whole network. The start is slower, and steps are
    faster."""
    preview: SampleConfig = field(default_factory=lambda: SampleConfig(steps=20, batch=16))
    """Sampling settings of the sample grids."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """Learn the guided velocity of a trained run, so that sampling needs no guidance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes is {self.minutes}; use 0 for no time limit")
