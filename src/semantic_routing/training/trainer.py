"""The state of a run and its step: prepare a batch, go down the gradient, average, save, show.

What a step sees depends only on the configuration and the step's number: order, noise, times and prompt dropout
are functions of (seed, sample, epoch). So a run that stops at any checkpoint and resumes ends with bitwise the same
weights, on one process or on as many as before; on another number, with the same up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from semantic_routing.checkpoint.load import checkpoints, load_training_state, read_state
from semantic_routing.checkpoint.save import Saver
from semantic_routing.common.config import to_dict
from semantic_routing.common.device import pick_device, use_bfloat16
from semantic_routing.common.distributed import World
from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.images.save import grid
from semantic_routing.common.manifest import versions
from semantic_routing.data.loader import Batch
from semantic_routing.flow import path, time_weights, training_times, velocity, velocity_loss
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import make_codec
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.runtime import autocast
from semantic_routing.sampling.load import locate_encoder
from semantic_routing.sampling.located import KEY
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.features import TextFeatures
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.optim import make_optimizers, set_rates
from semantic_routing.training.origins import model_origins
from semantic_routing.training.parallelize import local, parallelize, place_encoder, reshard, synchronise, whole
from semantic_routing.training.tracking import Row
from semantic_routing.training.watchdog import Phase


@dataclass(frozen=True)
class Inputs:
    """A microbatch as the network reads it: what the frozen models make of a batch."""

    features: TextFeatures
    latents: Float[Tensor, "B C h w"]
    noise: Float[Tensor, "B C h w"]
    t: Float[Tensor, " B"]


def prepare(bundle: TextToImage, batch: Batch, cfg: TrainConfig) -> Inputs:
    """Drop prompts, read the others, encode the images, draw the times."""
    device, (height, width) = bundle.device, batch.images.shape[1:3]
    dropped = (batch.drop_uniform < cfg.prompt_dropout).tolist()
    captions = [cfg.null_prompt if drop else c for c, drop in zip(batch.captions, dropped, strict=True)]
    extra = None if batch.posterior_noise is None else batch.posterior_noise.to(device)
    return Inputs(
        features=bundle.encode(captions, strict=False),
        latents=bundle.codec.encode(batch.images.to(device), extra),
        noise=batch.noise.to(device),
        t=training_times(batch.time_uniform, cfg.time, height * width).to(device),
    )


def flow_loss(bundle: TextToImage, inputs: Inputs, cfg: TrainConfig) -> Float[Tensor, ""]:
    """The velocity loss of a microbatch: noise the latents, predict, compare.

    Where routing reads the time from the noisy latents, the estimator learns beside it, from its own error alone.
    """
    t, latents, noise = inputs.t, inputs.latents, inputs.noise
    noisy = path(latents, noise, t)
    with autocast(bundle.device, bundle.bf16):
        told = bundle.model.gate_time(noisy, t)
        context = bundle.model.prepare_text(inputs.features, told.detach())
        predicted = bundle.model(noisy, t, context)
    weights = None if cfg.time.weighting == "uniform" else time_weights(t, cfg.time)
    loss = velocity_loss(predicted, velocity(latents, noise), weights)
    return loss if told is t else loss + (told - t).square().mean()


def microbatches(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut into equal parts."""
    size = len(batch.captions) // parts
    names = ("images", "captions", "noise", "posterior_noise", "time_uniform", "drop_uniform", "samples")
    filled = {name: getattr(batch, name) for name in names if getattr(batch, name) is not None}
    cuts = [slice(i * size, (i + 1) * size) for i in range(parts)]
    return [replace(batch, **{name: rows[cut] for name, rows in filled.items()}) for cut in cuts]


class Trainer:
    """Model, moving average, optimisers and the number of finished steps, on one process of a run."""

    def __init__(
        self, cfg: TrainConfig, out: Path, world: World | None = None, text: TextEncoderConfig | None = None
    ) -> None:
        """A run in the folder ``out``, its initial weights a function of the seed.

        ``text`` says where the text encoder is, if not yet in ``out``. ValueError where the parts do not fit.
        """
        self.cfg, self.out = cfg, out
        self.world = world = world or World(device=pick_device(cfg.device))
        self.step = self.skipped = self.bad = 0
        self.damaged: dict[str, int] = {}
        """Records seen and skipped, as ``DamageLog`` counts them."""
        self.beat: Callable[[Phase], None] = lambda phase: None
        """Told what the trainer is at."""
        cfg.share(world.count)
        device = world.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = make_model(cfg.model)
        bf16 = use_bfloat16(cfg.precision, device)
        encoder = TextEncoder.from_pretrained(text or locate_encoder(cfg.text, out))
        codec = make_codec(cfg.codec, device)
        self.record: dict[str, Any] = {"config": to_dict(cfg), KEY: model_origins(encoder, codec)}
        """What every checkpoint tells of the run."""
        self.bundle = TextToImage(
            model=parallelize(model, cfg.parallel, world, bf16=bf16, compiled=cfg.compile),
            encoder=place_encoder(encoder, cfg.parallel, world, compiled=cfg.compile),
            codec=codec,
            image_size=cfg.image_size,
            null_prompt=cfg.null_prompt,
            bf16=bf16,
        )
        _check_latents(self.bundle.codec.latent_shape(cfg.image_size), cfg.model)
        self.optimizers = make_optimizers(model, cfg.optim)
        self.ema = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.saver = Saver(out, keep=cfg.keep, keep_every=cfg.keep_every, group=world.threads)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint; ValueError where it is damaged or another model's."""
        state = read_state(checkpoint)
        self.ema = load_training_state(checkpoint, self.bundle.model, self.optimizers, self.world.threads)
        self.damaged = state.get("damaged", {})
        self.step, self.skipped, self.bad = (state.get(name, 0) for name in ("step", "skipped_steps", "bad_steps"))

    def prepare(self, batch: Batch) -> list[Inputs]:
        """What the frozen models make of this process's share of a batch, in microbatches."""
        return [prepare(self.bundle, part, self.cfg) for part in microbatches(batch, self.cfg.accumulate)]

    def advance(self, inputs: Sequence[Inputs]) -> Row:
        """One optimiser step over all processes' microbatches; returns its metrics, which are everybody's.

        Where loss or gradient are not finite nothing changes but the count of skipped steps; too many of those in a
        row raise TrainingFailed.
        """
        rate = set_rates(self.optimizers, self.cfg.optim, self.step, self.cfg.steps)
        mean = torch.zeros((), device=self.world.device)
        for left, part in zip(reversed(range(len(inputs))), inputs, strict=True):
            self.beat("forward")
            synchronise(self.bundle.model, left == 0)
            loss = flow_loss(self.bundle, part, self.cfg) / len(inputs)
            self.beat("backward")
            loss.backward()
            mean += loss.detach()
        self.beat("updating")
        norm = whole(nn.utils.clip_grad_norm_(self.bundle.model.parameters(), self.cfg.optim.clip))
        row: Row = {
            "step": self.step + 1,
            "loss": self.world.mean(mean).item(),
            "grad_norm": norm.item(),
            "lr": rate * self.cfg.optim.lr,
        }
        good = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        self._count(good, f"the loss is {row['loss']} and the gradient's norm {row['grad_norm']}")
        for optimizer in self.optimizers:
            if good:
                optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        if self.step % self.cfg.ema_every == 0:
            self._average()
        return row | {"skipped": self.skipped}

    def _count(self, good: bool, what: str) -> None:
        """Count a step that is to be skipped; too many in a row end the run."""
        self.skipped += not good
        self.bad = 0 if good else self.bad + 1
        if self.bad >= self.cfg.max_bad_steps:
            self._fail(what + (f", for {self.bad} steps in a row" if self.bad > 1 else ""), self.step + 1)

    def _fail(self, what: str, step: int) -> NoReturn:
        self.saver.close()
        saved = checkpoints(self.out)
        self.world.fail(
            TrainingFailed(
                f"training stopped at step {step}: {what}. Lower the learning rate or try --precision fp32; "
                + (f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been written yet")
            )
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Move the average towards the weights, each process its shard; its decay rises over the first updates."""
        updates = self.step // self.cfg.ema_every
        decay = min(self.cfg.ema_decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_([local(x) for x in self.ema.values()], self._shards(), 1 - decay)

    def _shards(self) -> list[Tensor]:
        """This process's part of the weights."""
        return [local(p.detach()) for p in self.bundle.model.parameters()]

    def save(self) -> None:
        """Begin to write a checkpoint, once the one before is written. Weights that are not finite raise."""
        finite = all(bool(p.isfinite().all()) for p in self._shards())
        if self.world.max(int(not finite))[0]:
            self._fail("weights are no longer finite", self.step)
        state: dict[str, Any] = {
            "position": self.step * self.cfg.batch,
            "skipped_steps": self.skipped,
            "bad_steps": self.bad,
            "damaged": self.damaged,
            "processes": self.world.count,
            "versions": versions(),
        } | self.record
        self.finish_writing()
        self.saver.save(self.step, self.bundle.model, self.ema, self.optimizers, state)

    def finish_writing(self) -> None:
        """Return when the last checkpoint is on disk; where that failed, all processes raise why."""
        try:
            self.saver.wait()
        except ValueError as error:
            self.world.fail(error)

    @contextmanager
    def averaged(self) -> Iterator[TextToImage]:
        """The bundle with the averaged weights, while the context lasts."""
        own = self._shards()
        trained = [x.clone() for x in own]
        torch._foreach_copy_(own, [local(x) for x in self.ema.values()])
        try:
            yield self.bundle
        finally:
            reshard(self.bundle.model)
            torch._foreach_copy_(own, trained)

    def preview(self, captions: Sequence[str]) -> UInt8[np.ndarray, "H W 3"]:
        """A grid of samples of the captions with the averaged weights; every process draws all of them."""
        with self.averaged() as bundle:
            images = bundle.sample(captions, [(i, 0) for i in range(len(captions))], self.cfg.preview)
        return grid(list(images.numpy(force=True)), columns=8)


def _check_latents(latent: tuple[int, int, int], model: DiTConfig) -> None:
    """Raise where the codec's latents (channels, height, width) are none that the transformer can read."""
    channels, height, width = latent
    if channels != model.channels:
        raise ValueError(f"the codec's latents have {channels} channels, but model.channels is {model.channels}")
    if height % model.patch or width % model.patch:
        raise ValueError(f"latents of {height} x {width} do not divide into patches: model.patch is {model.patch}")
