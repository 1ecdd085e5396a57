"""The settings of a training run: those of every run, and all of ``semroute train``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from semantic_routing.data.dataset import DataConfig
from semantic_routing.flow import TimeConfig
from semantic_routing.model.codec import CodecConfig
from semantic_routing.model.dit import DiTConfig
from semantic_routing.sampling.text_to_image import SampleConfig
from semantic_routing.text.config import TINY, TextEncoderConfig
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
    """Training steps."""
    batch: int = 512
    """Global batch size: images per step, of all processes together."""
    accumulate: int = 1
    """Gradient accumulation: microbatches into which each process splits its share of a batch."""
    seed: int = 42
    """Seed of initial weights, order, noise, times and dropout."""
    prompt_dropout: float = 0.1
    """Share of prompts replaced by the null prompt."""
    ema_decay: float = 0.99
    """Decay of the moving average of the weights per update, reached gradually over the first updates."""
    ema_every: int = 100
    """Steps between updates of the moving average."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of matrix products; "auto" is bf16 if the hardware has it."""
    max_bad_steps: int = 5
    """Consecutive steps without a finite loss and gradient that stop the run; fewer are skipped and counted."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    track: tuple[Service, ...] = ()
    """Services that also get the metrics: tensorboard (always, if it is installed), wandb, trackio."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2
    """Latest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this step are never deleted; 0 is none."""
    preview_every: int = 0
    """Steps between sample grids in the run's samples folder; 0 is none."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """The loss on held-out images."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or another device of torch."""

    @property
    def last_step(self) -> int:
        """Number of steps at whose end the run is done."""
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
        """Return each process's images per step; raise ValueError if they do not divide into equal microbatches."""
        if self.batch % (processes * self.accumulate):
            raise ValueError(
                f"a batch of {self.batch} does not divide among {processes} processes with accumulate="
                f"{self.accumulate}; make it a multiple of {processes * self.accumulate}"
            )
        return self.batch // processes


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """All settings of a run. Recipes return complete ones, and every checkpoint holds a copy."""

    model: DiTConfig = field(default_factory=DiTConfig)
    """The transformer. Its text width and layers are taken from the text encoder."""
    text: TextEncoderConfig = field(default_factory=lambda: TextEncoderConfig(name_or_path=TINY))
    """The frozen language model; the name "tiny" trains a small one first."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """The encoder of images into latents."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The distribution of the run over the processes of torchrun."""
    null_prompt: str = ""
    """The null prompt: trained as "no prompt", and used by classifier-free guidance."""
    compile: bool = False
    """Use torch.compile: on the blocks, on one CPU on the whole network; slower start, faster steps."""
    preview: SampleConfig = field(default_factory=lambda: SampleConfig(steps=20, batch=16))
    """Sampling of the grids."""
