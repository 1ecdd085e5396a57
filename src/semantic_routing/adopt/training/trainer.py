"""AdoptTrainer: steps that train the routing of a frozen pipeline, then a LoRA on its text projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from semantic_routing.adopt.api import adopt
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.training.config import AdoptConfig
from semantic_routing.adopt.training.lora import LORA_FILE, add_lora, check_lora, save_lora, switch_lora
from semantic_routing.adopt.training.subject import Subject, subject_errors
from semantic_routing.common.config import to_dict
from semantic_routing.common.distributed import World
from semantic_routing.common.images.save import grid
from semantic_routing.common.troubles import Troubles
from semantic_routing.data.batch import Batch
from semantic_routing.data.damage import Skipped
from semantic_routing.data.dataset import Dataset
from semantic_routing.flow import FIXED_TIMES, path, time_weights, training_times, velocity, velocity_loss
from semantic_routing.model.runtime import allow_graphs
from semantic_routing.sampling.located import KEY
from semantic_routing.training.latents import batch_latents
from semantic_routing.training.optim import set_rates
from semantic_routing.training.origins import frozen_origins
from semantic_routing.training.run_folder import Kind
from semantic_routing.training.steps import Prepared, Steps
from semantic_routing.training.tracking import Row
from semantic_routing.training.validation import HeldOut, held_out, validate
from semantic_routing.training.watchdog import Phase

ADOPT = Kind(
    AdoptConfig, "semroute adopt train", frozenset({"pipeline", "data", "lora"}), ("routing.safetensors", LORA_FILE)
)


@dataclass(frozen=True)
class Inputs:
    """A microbatch after the frozen models have processed it."""

    texts: Any
    latents: Float[Tensor, "B C h w"]
    noise: Float[Tensor, "B C h w"]
    t: Float[Tensor, " B"]
    skipped: list[tuple[Skipped, ...]]
    """Records that were skipped for each row."""


class Trained(nn.Module):
    """All trained parameters; the names of the routing's begin with ``router.``, which gives them its learning rate."""

    def __init__(self, routing: Routing, lora: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.router = routing
        self.lora = nn.ParameterDict({name.replace(".", "/"): p for name, p in lora.items()})


class AdoptTrainer(Steps):
    """A run that trains an adopted pipeline; parameters outside of the routing and the LoRA never change."""

    cfg: AdoptConfig
    title = "Training the routing"
    again = ADOPT.again

    def __init__(self, cfg: AdoptConfig, out: Path, world: World, subject: Subject) -> None:
        """Adopt a frozen pipeline; ValueError, with the pipeline unchanged, if these settings cannot train it.

        ``cfg`` holds the image size and the shift (``resolved``).
        """
        super().__init__(cfg, out, world)
        self.subject, self.pipe, self.codec = subject, subject.pipe, subject.codec
        transformer = self.pipe.transformer
        if cfg.lora.rank:
            check_lora(transformer)
        if cfg.gradient_checkpointing and not subject.checkpoints:
            name = type(transformer).__name__
            raise ValueError(f"{name} cannot recompute its blocks: leave out gradient_checkpointing")
        self.record = {"config": to_dict(cfg), KEY: origins(self.pipe)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.routing = adopt(self.pipe, cfg.arm, weights=cfg.weights, injection=cfg.injection)
        self._lora = add_lora(transformer, cfg.lora, cfg.seed) if cfg.lora.rank else {}
        self.routing.requires_grad_(True)  # peft freezes all of the transformer but its adapters
        if cfg.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if cfg.compile:
            allow_graphs()
            for block in subject.blocks():
                block.compile(dynamic=False)
        self._train(Trained(self.routing, self._lora))

    @property
    def trains_lora(self) -> bool:
        """Whether the routing is finished, so that the step trains the LoRA."""
        return self.step >= self.cfg.steps

    def prepare(self, batch: Batch[Tensor]) -> list[Inputs]:
        return [self._prepare(part) for part in batch.split(self.cfg.accumulate)]

    @torch.no_grad()
    def _prepare(self, batch: Batch[Tensor]) -> Inputs:
        """Drop prompts, encode the others and the images, and draw the times."""
        device, (height, width) = self.world.device, batch.images.shape[1:3]
        dropped = (batch.drop_uniform < self.cfg.prompt_dropout).tolist()
        return Inputs(
            texts=self.subject.texts([None if drop else c for c, drop in zip(batch.captions, dropped, strict=True)]),
            latents=batch_latents(self.codec, batch, device),
            noise=batch.noise.to(device),
            t=training_times(batch.time_uniform, self.cfg.time, height * width).to(device),
            skipped=batch.skipped,
        )

    def loss(self, part: Inputs) -> Float[Tensor, ""]:
        noisy = path(part.latents, part.noise, part.t)
        weights = None if self.cfg.time.weighting == "uniform" else time_weights(part.t, self.cfg.time)
        predicted = self.subject.velocity(noisy, part.t, part.texts)
        return velocity_loss(predicted, velocity(part.latents, part.noise), weights)

    def advance(self, inputs: Sequence[Prepared], beat: Callable[[Phase], None] = lambda phase: None) -> Row:
        if self.trains_lora:
            self._begin_lora()
        lora = self.trains_lora
        row = super().advance(inputs, beat)
        return row if lora else row | {"lr": self.optimizers[0].param_groups[-1]["lr"]}  # that of the routing

    @torch.no_grad()
    def _begin_lora(self) -> None:
        """Freeze the averaged routing and turn the LoRA on; at later steps this changes nothing."""
        for name, p in self.model.named_parameters():
            if name.startswith("router."):
                p.copy_(self.ema[name])
        self.routing.requires_grad_(False)
        switch_lora(self.pipe.transformer, self._lora, on=True)

    def _set_rates(self) -> float:
        cfg = self.cfg
        first, steps = (cfg.steps, cfg.lora.steps) if self.trains_lora else (0, cfg.steps)
        return set_rates(self.optimizers, cfg.optim, self.step - first, (self.step - first) / steps)

    @torch.no_grad()
    def _average(self) -> None:
        """Update the average of what the step has trained; the decay of routing and LoRA rises separately."""
        step, trained = self.step, "router."
        if self.step > self.cfg.steps:
            step, trained = self.step - self.cfg.steps, "lora."
        updates = step // self.cfg.ema_every
        decay = min(self.cfg.ema_decay, (1 + updates) / (10 + updates))
        for name, p in self.model.named_parameters():
            if name.startswith(trained):
                self.ema[name].lerp_(p, 1 - decay)

    def save(self) -> None:
        """Start writing a checkpoint, and write the averaged routing, its card and the LoRA for users."""
        super().save()
        with self.averaged():
            self.routing.save(self.out)
            if self._lora and self.step > self.cfg.steps:
                save_lora(self.pipe, self.out)

    def preview(self, data: Dataset) -> UInt8[np.ndarray, "H W 3"]:
        captions = data.captions(self.cfg.preview.batch)
        with self.averaged():
            images = self.subject.sample(captions, [(i, 0) for i in range(len(captions))], self.cfg.preview)
        return grid(list(images.numpy(force=True)), columns=8)

    def held_out(self) -> HeldOut:
        return held_out(self.cfg.validation, self.cfg.data, self.cfg.image_size)

    def validate(self, pictures: HeldOut, troubles: Troubles) -> dict[str, float]:
        with self.averaged():
            return validate(self.subject, pictures, self.cfg.validation, self.world, troubles, subject_errors)

    @torch.no_grad()
    def facts(self) -> dict[str, float]:
        """Return how far the weights are from the original state: half the sum of all changes, averaged over rows."""
        weights = self.routing.weights(torch.tensor(FIXED_TIMES, device=self.world.device))
        change = weights.clone()
        change[..., 0] -= 1
        return {"router_origin": weights[..., 0].mean().item(), "router_moved": change.abs().sum(-1).mean().item() / 2}


def resolved(cfg: AdoptConfig, subject: Subject) -> AdoptConfig:
    """Return the settings with the pipeline's own image size and shift; ValueError for an image that does not fit."""
    size = subject.image_size = cfg.image_size or subject.image_size
    subject.latent_shape(size, size)
    time = replace(cfg.time, shift=subject.shift(size, size), shift_size=0) if cfg.scheduler_shift else cfg.time
    return replace(cfg, image_size=size, time=time)


def origins(pipe: Any) -> dict[str, str]:
    """Return digests of a pipeline's frozen models, taken before it is adopted."""
    return frozen_origins(pipe.text_encoder, pipe.tokenizer, pipe.vae, transformer=pipe.transformer)
