"""Trainer: the state of a run (weights, moving average, optimisers, counts) and one training step.

What a step reads depends only on the configuration and the step's number: order, noise, times and prompt dropout are
functions of (seed, sample, epoch). So a run that stops at a checkpoint and resumes ends with bitwise the same weights
at the same world size, and with the same up to rounding at another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from semantic_routing.common.troubles import say
from semantic_routing.data.batch import Batch
from semantic_routing.data.damage import FILE as DAMAGED
from semantic_routing.data.damage import DamageLog, Skipped
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
from semantic_routing.training.latents import batch_latents, check_kept
from semantic_routing.training.optim import make_optimizers, set_rates
from semantic_routing.training.origins import model_origins
from semantic_routing.training.parallelize import local, parallelize, place_encoder, reshard, synchronise, whole
from semantic_routing.training.tracking import Row
from semantic_routing.training.watchdog import Phase


@dataclass(frozen=True)
class Inputs:
    """A microbatch after the frozen models: what the network reads."""

    features: TextFeatures
    latents: Float[Tensor, "B C h w"]
    noise: Float[Tensor, "B C h w"]
    t: Float[Tensor, " B"]
    skipped: list[tuple[Skipped, ...]]
    """Records that were skipped for each row."""


def prepare(bundle: TextToImage, batch: Batch[Tensor], cfg: TrainConfig) -> Inputs:
    """Drop prompts, encode the others and the images, and draw the times."""
    device, (height, width) = bundle.device, batch.images.shape[1:3]
    dropped = (batch.drop_uniform < cfg.prompt_dropout).tolist()
    captions = [cfg.null_prompt if drop else c for c, drop in zip(batch.captions, dropped, strict=True)]
    # A GPU packs after the copy (``Layout``); FuseDiT reads keys and values, which are padded.
    packed = device.type == "cpu" and not bundle.model.cfg.strategy.reads_keys
    return Inputs(
        features=bundle.encode(captions, strict=False, packed=packed),
        latents=batch_latents(bundle.codec, batch, device),
        noise=batch.noise.to(device),
        t=training_times(batch.time_uniform, cfg.time, height * width).to(device),
        skipped=batch.skipped,
    )


def flow_loss(bundle: TextToImage, inputs: Inputs, cfg: TrainConfig) -> Float[Tensor, ""]:
    """Return the velocity loss of a microbatch: noise the latents, predict, compare.

    A network that estimates the time from the noisy latents also learns that, from the estimate's own error alone.
    """
    t, latents, noise = inputs.t, inputs.latents, inputs.noise
    noisy = path(latents, noise, t)
    with autocast(bundle.device, bundle.bf16):
        gate_time = bundle.model.gate_time(noisy, t)
        context = bundle.model.prepare_text(inputs.features, gate_time.detach())
        predicted = bundle.model(noisy, t, context)
    weights = None if cfg.time.weighting == "uniform" else time_weights(t, cfg.time)
    loss = velocity_loss(predicted, velocity(latents, noise), weights)
    return loss + (gate_time - t).square().mean() if bundle.model.reads_latents else loss


class Trainer:
    """The state of a run on one process: model, moving average, optimisers, finished steps, skipped records."""

    def __init__(
        self, cfg: TrainConfig, out: Path, world: World | None = None, text: TextEncoderConfig | None = None
    ) -> None:
        """Build a run in the folder ``out``, with initial weights that are a function of the seed.

        ``text`` locates the text encoder if it is not in ``out`` yet. Raises ValueError if the parts do not fit.
        """
        self.cfg, self.out = cfg, out
        self.world = world = world or World(device=pick_device(cfg.device))
        self.step = self.skipped = self.bad = 0
        self.damage = DamageLog(out / DAMAGED if world.first else None, most=cfg.data.max_damaged)
        cfg.share(world.count)
        device = world.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = make_model(cfg.model)
        bf16 = use_bfloat16(cfg.precision, device)
        encoder = TextEncoder.from_pretrained(text or locate_encoder(cfg.text, out))
        codec = make_codec(cfg.codec, device)
        for words in check_kept(cfg.codec, codec):
            if world.first:
                say(words)
        self.record: dict[str, Any] = {"config": to_dict(cfg), KEY: model_origins(encoder, codec)}
        """Facts of the run that every checkpoint records."""
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
        """Load a checkpoint; raises ValueError if it is damaged or of another model."""
        state = read_state(checkpoint)
        self.ema = load_training_state(checkpoint, self.bundle.model, self.optimizers, self.world.threads)
        self.damage.restore(state.get("damaged", {}))
        self.step, self.skipped, self.bad = (state.get(name, 0) for name in ("step", "skipped_steps", "bad_steps"))

    def prepare(self, batch: Batch[Tensor]) -> list[Inputs]:
        """Run the frozen models on this process's share of a batch, in microbatches."""
        return [prepare(self.bundle, part, self.cfg) for part in batch.split(self.cfg.accumulate)]

    def advance(self, inputs: Sequence[Inputs], beat: Callable[[Phase], None] = lambda phase: None) -> Row:
        """Take one optimiser step over all processes' microbatches; return its metrics, which are those of all.

        ``beat`` is called with each phase of the step. If loss or gradient is not finite, only the step's number and
        the count of skipped steps change; too many of those in a row raise TrainingFailed.
        """
        rate = set_rates(self.optimizers, self.cfg.optim, self.step, self.cfg.steps)
        mean = torch.zeros((), device=self.world.device)
        for left, part in zip(reversed(range(len(inputs))), inputs, strict=True):
            beat("forward")
            synchronise(self.bundle.model, left == 0)
            loss = flow_loss(self.bundle, part, self.cfg) / len(inputs)
            beat("backward")
            loss.backward()
            mean += loss.detach()
            self.damage.add(part.skipped)
        beat("updating")
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
        """Count skipped steps; end the run after too many in a row."""
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
        """Move the average of this process's shards towards the weights; the decay rises over the first updates."""
        updates = self.step // self.cfg.ema_every
        decay = min(self.cfg.ema_decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_([local(x) for x in self.ema.values()], self._shards(), 1 - decay)

    def _shards(self) -> list[Tensor]:
        """Return this process's shards of the weights."""
        return [local(p.detach()) for p in self.bundle.model.parameters()]

    def count_damage(self) -> None:
        """Count the skipped records of all processes; end the run if their share is too large."""
        tallies = self.world.all_gather(self.damage.take())
        self.world.everywhere(lambda: self.damage.merge(tallies))

    def save(self) -> None:
        """Start writing a checkpoint, after the one before is written; fail if the weights are not finite."""
        self.count_damage()
        finite = all(bool(p.isfinite().all()) for p in self._shards())
        if self.world.max(int(not finite))[0]:
            self._fail("weights are no longer finite", self.step)
        state: dict[str, Any] = {
            "position": self.step * self.cfg.batch,
            "skipped_steps": self.skipped,
            "bad_steps": self.bad,
            "damaged": self.damage.counts(),
            "processes": self.world.count,
            "versions": versions(),
        } | self.record
        self.finish_writing()
        self.saver.save(self.step, self.bundle.model, self.ema, self.optimizers, state)

    def finish_writing(self) -> None:
        """Wait until the last checkpoint is on disk; if that failed, end all processes with the reason."""
        try:
            self.saver.wait()
        except ValueError as error:
            self.world.fail(error)

    @contextmanager
    def averaged(self) -> Iterator[TextToImage]:
        """Put the averaged weights into the bundle while the context lasts."""
        own = self._shards()
        trained = [x.clone() for x in own]
        torch._foreach_copy_(own, [local(x) for x in self.ema.values()])
        try:
            yield self.bundle
        finally:
            reshard(self.bundle.model)
            torch._foreach_copy_(own, trained)

    def preview(self, captions: Sequence[str]) -> UInt8[np.ndarray, "H W 3"]:
        """Sample a grid of images of the captions with the averaged weights; every process samples all of them."""
        with self.averaged() as bundle:
            images = bundle.sample(captions, [(i, 0) for i in range(len(captions))], self.cfg.preview)
        return grid(list(images.numpy(force=True)), columns=8)


def _check_latents(latent: tuple[int, int, int], model: DiTConfig) -> None:
    """Raise ValueError if the codec's latents do not fit the transformer's channels and patch size."""
    channels, height, width = latent
    if channels != model.channels:
        raise ValueError(f"the codec's latents have {channels} channels, but model.channels is {model.channels}")
    if height % model.patch or width % model.patch:
        raise ValueError(f"latents of {height} x {width} do not divide into patches: model.patch is {model.patch}")
