"""The training loop: one process, exactly resumable, never leaving anything half-written.

What a step sees depends only on the configuration and the step's number: order, noise, times and prompt dropout
are functions of (seed, sample, epoch). So a checkpoint needs no random state, and a run that stops at any
checkpoint and resumes ends with bitwise the same weights.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from semantic_routing.checkpoint import (
    check_writable,
    checkpoints,
    find_checkpoint,
    load_training_state,
    prune,
    save_checkpoint,
    write_text,
    written_whole,
)
from semantic_routing.codec import CodecConfig, make_codec
from semantic_routing.config import from_dict, to_dict
from semantic_routing.data.folder import ImageFolder
from semantic_routing.data.order import Batch, Source, load_batch, prefetch
from semantic_routing.data.sources import open_source
from semantic_routing.data.stories import story
from semantic_routing.device import keep_freed_memory, pick_device, use_bfloat16
from semantic_routing.dit import DiTConfig
from semantic_routing.errors import Interrupted, TrainingFailed
from semantic_routing.flow import logit_normal, path, velocity, velocity_loss
from semantic_routing.fusedit import make_model
from semantic_routing.fusion import parse_arm
from semantic_routing.generate import (
    TEXT_ENCODER,
    TINY,
    Bundle,
    SampleConfig,
    autocast,
    locate_encoder,
    read_run_config,
)
from semantic_routing.manifest import manifest
from semantic_routing.optim import OptimConfig, make_optimizers, set_rates
from semantic_routing.pictures import grid, save_png
from semantic_routing.text_encoder import TextEncoder, TextEncoderConfig, text_shape
from semantic_routing.tiny_lm import tiny_lm

OnStep = Callable[[int], None]
Row = dict[str, int | float]
"""One step's metrics."""
CORPUS_SEED = 1
"""Seed of the stories that the tiny language model learns from; one model then serves every run."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run; recipes return complete ones, and the resolved one is written beside every checkpoint."""

    data: str = "shapes"
    """"shapes" (the toy world), or a folder or JSON/JSONL manifest of pictures with `image` and `text`."""
    image_size: int = 256
    """Side of the square training images, in pixels."""
    model: DiTConfig = field(default_factory=DiTConfig)
    """The transformer. Its text width and layers are taken from the text encoder."""
    text: TextEncoderConfig = field(default_factory=lambda: TextEncoderConfig(name_or_path=TINY))
    """The frozen language model; the name "tiny" makes one on the spot."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    """What turns images into latents."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    steps: int = 500_000
    """Training steps."""
    batch: int = 512
    """Images a step."""
    seed: int = 42
    """Decides initial weights, order, noise, times and dropout."""
    prompt_dropout: float = 0.1
    """Share of prompts replaced by the null prompt."""
    null_prompt: str = ""
    """The null prompt: what the model learns as "no prompt", and guidance moves away from."""
    time_mean: float = 0.0
    """Mean of the logit of training times; below 0 prefers noise."""
    time_std: float = 1.0
    """Standard deviation of the logit of training times."""
    ema_decay: float = 0.99
    """Decay of the moving average of the weights at every update, approached over the first updates."""
    ema_every: int = 100
    """Steps between updates of the moving average."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Type of matrix products; "auto" is bf16 where the hardware has it."""
    compile: bool = False
    """Compile the blocks with torch.compile: slower to start, faster steps."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last step always writes one."""
    keep: int = 2
    """Checkpoints kept."""
    preview_every: int = 0
    """Steps between sample grids in the run's samples folder; 0 is none."""
    preview: SampleConfig = field(default_factory=lambda: SampleConfig(steps=20, batch=16))
    """How the grids are sampled."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "image_size", "ema_every", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.preview_every < 0:
            raise ValueError(f"preview_every is {self.preview_every}; use 0 for no sample grids")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to below 2**63")
        for name in ("prompt_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1")
        if not (self.time_std >= 0 and math.isfinite(self.time_std) and math.isfinite(self.time_mean)):
            raise ValueError(f"time_std {self.time_std} must be at least 0, and it and time_mean be finite")


def train_step(bundle: Bundle, batch: Batch, cfg: TrainConfig) -> Float[Tensor, ""]:
    """The velocity loss of one batch: read the prompts, noise the latents, predict, compare."""
    device = bundle.device
    dropped = (batch.drop_uniform < cfg.prompt_dropout).tolist()
    captions = [cfg.null_prompt if drop else c for c, drop in zip(batch.captions, dropped, strict=True)]
    features = bundle.encode(captions)
    extra = None if batch.posterior_noise is None else batch.posterior_noise.to(device)
    latents = bundle.codec.encode(batch.images.to(device), extra)
    noise = batch.noise.to(device)
    t = logit_normal(batch.time_uniform, cfg.time_mean, cfg.time_std).to(device)
    with autocast(device, bundle.bf16):
        context = bundle.model.prepare_text(features, t)
        predicted = bundle.model(path(latents, noise, t), t, context)
    return velocity_loss(predicted, velocity(latents, noise))


def start(cfg: TrainConfig, out: Path, on_step: OnStep | None = None) -> Path:
    """Begin the run ``cfg`` in the folder ``out`` and train it to its end; returns the last checkpoint.

    ``on_step`` is called after each step with the number of finished steps. Raises ValueError for what the user
    can mend, before anything is written; Interrupted after SIGINT or SIGTERM, TrainingFailed for a loss that is
    not finite.
    """
    if checkpoints(out):
        raise ValueError(
            f"{out} already holds a run: go on with `semroute train --resume {out}` or choose another --out"
        )
    check_writable(out)
    source = open_source(cfg.data, size=cfg.image_size, seed=cfg.seed)
    text = cfg.text
    if text.name_or_path == TINY:
        text = replace(text, name_or_path=str(tiny_lm(training_corpus(source))))
    shape, arm = text_shape(text), parse_arm(cfg.model.arm)
    model = replace(cfg.model, arm=arm, text_width=shape.width, text_layers=len(shape.layers))
    trainer = Trainer(replace(cfg, model=model), out, text=text)
    if cfg.text.name_or_path == TINY:
        with written_whole(out / TEXT_ENCODER) as scratch:
            shutil.copytree(text.name_or_path, scratch)
    write_text(out / "config.json", json.dumps(to_dict(trainer.cfg), indent=2) + "\n")
    return _run(trainer, source, on_step)


def resume(out: Path, on_step: OnStep | None = None) -> Path:
    """Go on with the run in the folder ``out`` from its latest checkpoint, as ``start`` would have."""
    folder = find_checkpoint(out)
    run = folder.parent.parent
    if folder not in checkpoints(run)[-1:]:
        raise ValueError(f"{folder} is not its run's latest checkpoint; move later ones away to go on from there")
    cfg = from_dict(TrainConfig, read_run_config(folder))
    source = open_source(cfg.data, size=cfg.image_size, seed=cfg.seed)
    return _run(Trainer(cfg, run, folder), source, on_step)


def training_corpus(source: Source, size: int = 20_000) -> list[str]:
    """What the tiny language model reads: stories of the toy world, and the user's own captions."""
    toy = [story(CORPUS_SEED, index) for index in range(size)]
    return toy + source.captions(size) if isinstance(source, ImageFolder) else toy


def _run(trainer: Trainer, source: Source, on_step: OnStep | None) -> Path:
    """Train from where the trainer is to the last step; returns the last checkpoint."""
    keep_freed_memory()
    cfg, out, first = trainer.cfg, trainer.out, trainer.step
    facts = manifest(config=to_dict(cfg), seeds={"run": cfg.seed}, from_step=first)
    write_text(out / "manifest.json", json.dumps(facts, indent=2) + "\n")
    codec = trainer.bundle.codec
    load = partial(
        load_batch, source, cfg.seed,
        batch_size=cfg.batch, noise_shape=codec.latent_shape(cfg.image_size), posterior=codec.has_posterior,
    )  # fmt: skip
    # A CPU that trains has no core to spare: a thread that draws beside it would stall every parallel region.
    batches = prefetch(load, first) if trainer.bundle.device.type != "cpu" else (load(step) for step in count(first))
    bar = tqdm(total=cfg.steps, initial=first, desc=f"Training {cfg.model.arm}", unit="step")
    with closing(batches), bar, _stop_signals() as stop, Metrics(out, first) as metrics:
        while trainer.step < cfg.steps:
            began = time.perf_counter()
            row = trainer.advance(next(batches))
            row["images_per_s"] = cfg.batch / (time.perf_counter() - began)
            bar.set_postfix(loss=f"{row['loss']:.4f}", img_s=f"{row['images_per_s']:.0f}", refresh=False)
            bar.update()
            last = trainer.step == cfg.steps
            if last or trainer.step % cfg.log_every == 0:
                metrics.write(row)
            if cfg.preview_every and trainer.step % cfg.preview_every == 0:
                trainer.preview(source)
            if on_step is not None:
                on_step(trainer.step)
            if last or stop or trainer.step % cfg.checkpoint_every == 0:
                trainer.save()
            if stop and not last:
                raise Interrupted(
                    f"stopped at step {trainer.step} of {cfg.steps} and wrote {find_checkpoint(out)}; "
                    f"go on with: semroute train --resume {shlex.quote(str(out))}",
                    stop[0],
                )
    return find_checkpoint(out)


class Trainer:
    """The state of a run: model, moving average, optimisers and the number of finished steps."""

    def __init__(
        self, cfg: TrainConfig, out: Path, checkpoint: Path | None = None, text: TextEncoderConfig | None = None
    ) -> None:
        """A run in the folder ``out``, from a checkpoint or, its initial weights a function of the seed, anew.

        ``text`` says where the text encoder is, if not yet in ``out``. ValueError where the parts do not fit.
        """
        self.cfg, self.out, self.step = cfg, out, 0
        device = pick_device(cfg.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = make_model(cfg.model).to(device)
        self.bundle = Bundle(
            model=model,
            encoder=TextEncoder.from_pretrained(text or locate_encoder(cfg.text, out), device),
            codec=make_codec(cfg.codec, device),
            image_size=cfg.image_size,
            null_prompt=cfg.null_prompt,
            bf16=use_bfloat16(cfg.precision, device),
        )
        _check_latents(self.bundle.codec.latent_shape(cfg.image_size), cfg.model)
        self.optimizers = make_optimizers(model, cfg.optim)
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        if checkpoint is not None:
            self.step, self.ema = load_training_state(checkpoint, model, self.optimizers)
        if cfg.compile:
            for block in model.blocks:
                block.compile(dynamic=False)

    def advance(self, batch: Batch) -> Row:
        """One optimiser step; returns its metrics. A loss that is not finite changes nothing and raises."""
        rate = set_rates(self.optimizers, self.cfg.optim, self.step, self.cfg.steps)
        loss = train_step(self.bundle, batch, self.cfg)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.bundle.model.parameters(), self.cfg.optim.clip)
        row: Row = {
            "step": self.step + 1,
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "lr": rate * self.cfg.optim.lr,
        }
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise self._failure(f"the loss is {row['loss']} and the gradient's norm {row['grad_norm']}", self.step + 1)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.step % self.cfg.ema_every == 0:
            self._average()
        return row

    def _failure(self, what: str, step: int) -> TrainingFailed:
        saved = checkpoints(self.out)
        return TrainingFailed(
            f"training stopped at step {step}: {what}. Lower the learning rate or try --precision fp32; "
            + (f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been written yet")
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average towards the weights; its decay rises over the first updates."""
        updates = self.step // self.cfg.ema_every
        decay = min(self.cfg.ema_decay, (1 + updates) / (10 + updates))
        weights = [p.detach() for p in self.bundle.model.parameters()]
        torch._foreach_lerp_(list(self.ema.values()), weights, 1 - decay)

    def save(self) -> Path:
        """Write a checkpoint, then delete those that are no longer kept. Weights that are not finite raise."""
        if not all(p.isfinite().all() for p in self.bundle.model.parameters()):
            raise self._failure("weights are no longer finite", self.step)
        state = {"config": to_dict(self.cfg)}
        folder = save_checkpoint(self.out, self.step, self.bundle.model, self.ema, self.optimizers, state)
        prune(self.out, self.cfg.keep)
        return folder

    def preview(self, source: Source) -> None:
        """Sample a grid of fixed prompts with the averaged weights into the run's ``samples`` folder."""
        model, captions = self.bundle.model, source.captions(self.cfg.preview.batch)
        trained = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(self.ema)
        try:
            images = self.bundle.sample(captions, [(i, 0) for i in range(len(captions))], self.cfg.preview)
        finally:
            model.load_state_dict(trained)
        picture = grid(list(images.numpy(force=True)), columns=8)
        save_png(
            self.out / "samples" / f"step-{self.step:07d}.png",
            picture,
            scale=max(1, 96 // self.cfg.image_size),
        )


def _check_latents(latent: tuple[int, int, int], model: DiTConfig) -> None:
    """Raise where the codec's latents (channels, height, width) are none that the transformer can read."""
    channels, height, width = latent
    if channels != model.channels:
        raise ValueError(f"the codec's latents have {channels} channels, but model.channels is {model.channels}")
    if height % model.patch or width % model.patch:
        raise ValueError(f"latents of {height} x {width} do not divide into patches: model.patch is {model.patch}")


class Metrics:
    """Lines of ``metrics.jsonl``, and TensorBoard's files where it is installed."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "metrics.jsonl"
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        # What a stopped run wrote after its last checkpoint will come again.
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= step]
        write_text(self.path, "".join(row + "\n" for row in kept))
        self.board: Any = None
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *error: object) -> None:
        if self.board is not None:
            self.board.close()

    def write(self, row: Row) -> None:
        """Append one step's metrics."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, int(row["step"]))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM instead of their ending the process; a second SIGINT still does."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
