"""Trainer: the runs of ``semroute train``, which train a network and its router to predict the flow's velocity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.common.config import to_dict
from semantic_routing.common.device import use_bfloat16
from semantic_routing.common.distributed import World
from semantic_routing.common.images.save import grid
from semantic_routing.common.troubles import Troubles, say
from semantic_routing.data.batch import Batch
from semantic_routing.data.buckets import bucket_shapes
from semantic_routing.data.damage import Skipped
from semantic_routing.data.dataset import Dataset
from semantic_routing.flow import path, time_weights, training_times, velocity, velocity_loss
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import Codec, make_codec
from semantic_routing.model.dit import DiTConfig
from semantic_routing.model.runtime import autocast
from semantic_routing.sampling.load import locate_encoder
from semantic_routing.sampling.located import KEY
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.features import TextFeatures
from semantic_routing.training.config import TrainConfig
from semantic_routing.training.distill import Teacher, teacher_network
from semantic_routing.training.latents import batch_latents, check_kept, kept_latents
from semantic_routing.training.metrics import flops_per_image, routing_entropy
from semantic_routing.training.origins import TEXT, model_origins, weights_digest
from semantic_routing.training.parallelize import parallelize, place_encoder
from semantic_routing.training.steps import Steps
from semantic_routing.training.validation import HeldOut, held_out, validate


@dataclass(frozen=True)
class Inputs:
    """A microbatch after the frozen models have processed it: the inputs of the network."""

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


def flow_loss(
    bundle: TextToImage, inputs: Inputs, cfg: TrainConfig, teacher: Teacher | None = None
) -> Float[Tensor, ""]:
    """Return the velocity loss of a microbatch: add noise to the latents, predict, compare.

    The velocity to learn is that of the latents, or the guided one of a ``teacher``.
    A network that estimates the time from the noisy latents also learns the estimate, only from the estimate's own
    error.
    """
    t, latents, noise = inputs.t, inputs.latents, inputs.noise
    noisy = path(latents, noise, t)
    with autocast(bundle.device, bundle.bf16):
        gate_time = bundle.model.gate_time(noisy, t)
        context = bundle.model.prepare_text(inputs.features, gate_time.detach())
        predicted = bundle.model(noisy, t, context)
    weights = None if cfg.time.weighting == "uniform" else time_weights(t, cfg.time)
    wanted = velocity(latents, noise) if teacher is None else teacher.velocity(noisy, t, inputs.features)
    loss = velocity_loss(predicted, wanted, weights)
    return loss + (gate_time - t).square().mean() if bundle.model.reads_latents else loss


class Trainer(Steps):
    """A run that trains a whole network, on one process."""

    cfg: TrainConfig

    def __init__(
        self, cfg: TrainConfig, out: Path, world: World | None = None, text: TextEncoderConfig | None = None
    ) -> None:
        """Build a run in the folder ``out``, with initial weights that depend only on the seed.

        ``text`` locates the text encoder if it is not in ``out`` yet. Raises ValueError if the parts do not match.
        """
        super().__init__(cfg, out, world)
        self.title, self.limit = f"Training {cfg.model.arm}", 60 * cfg.minutes
        world, device = self.world, self.world.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            model = make_model(cfg.model)
        bf16 = use_bfloat16(cfg.precision, device)
        encoder = TextEncoder.from_pretrained(text or locate_encoder(cfg.text, out))
        codec = make_codec(cfg.codec, device)
        for words in check_kept(cfg.codec, codec):
            if world.first:
                say(words)
        self.record = {"config": to_dict(cfg), KEY: model_origins(encoder, codec)}
        taught = None
        if cfg.distill.teacher:
            taught = teacher_network(cfg.distill, cfg.model, cfg.null_prompt, self.record[KEY][TEXT])
            model.load_state_dict(taught.state_dict())
            self.record[KEY]["teacher"] = weights_digest(taught)
        self.bundle = TextToImage(
            model=parallelize(model, cfg.parallel, world, bf16=bf16, compiled=cfg.compile),
            encoder=place_encoder(encoder, cfg.parallel, world, compiled=cfg.compile),
            codec=codec,
            image_size=cfg.image_size,
            null_prompt=cfg.null_prompt,
            bf16=bf16,
        )
        _check_latents(self.bundle.codec.latent_shape(cfg.image_size), cfg.model)
        if cfg.data.buckets:
            _check_buckets(self.bundle.codec, cfg)
        self.codec = codec
        self.teacher: Teacher | None = None
        if taught is not None:
            taught = parallelize(taught, cfg.parallel, world, bf16=bf16, compiled=cfg.compile)
            self.teacher = Teacher(taught, self.bundle, cfg.distill.guidance)
        self._train(model)

    def prepare(self, batch: Batch[Tensor]) -> list[Inputs]:
        return [prepare(self.bundle, part, self.cfg) for part in batch.split(self.cfg.accumulate)]

    def loss(self, part: Inputs) -> Float[Tensor, ""]:
        return flow_loss(self.bundle, part, self.cfg, self.teacher)

    def preview(self, data: Dataset) -> UInt8[np.ndarray, "H W 3"]:
        captions, how = data.captions(self.cfg.preview.batch), self.cfg.preview
        if self.teacher is not None:
            how = replace(how, guidance=1.0)
        with self.averaged():
            images = self.bundle.sample(captions, [(i, 0) for i in range(len(captions))], how)
        return grid(list(images.numpy(force=True)), columns=8)

    def held_out(self) -> HeldOut:
        cfg = self.cfg
        return held_out(cfg.validation, cfg.data, cfg.image_size, kept_latents(cfg.codec))

    def validate(self, pictures: HeldOut, troubles: Troubles) -> dict[str, float]:
        with self.averaged():
            return validate(self.bundle, pictures, self.cfg.validation, self.world, troubles)

    def facts(self) -> dict[str, float]:
        return routing_entropy(self.bundle.model)

    def flops(self, part: Inputs) -> int:
        images, _, height, width = part.latents.shape
        trained = images * flops_per_image(self.cfg.model, height, width, part.features.mask.shape[1])
        return trained if self.teacher is None else trained * 5 // 3  # two forward passes besides forward and backward


def _check_buckets(codec: Codec, cfg: TrainConfig) -> None:
    """Raise ValueError unless the latents of images in every bucket divide into patches."""
    multiple, patch = cfg.data.bucket_multiple, cfg.model.patch
    for shape in bucket_shapes(cfg.image_size, multiple):
        _, height, width = codec.latent_shape(*shape)
        if height % patch or width % patch:
            raise ValueError(
                f"the latents of images of {shape[0]} x {shape[1]}, {height} x {width}, do not divide into patches of "
                f"{patch}: data.bucket_multiple is {multiple}; use a larger one"
            )


def _check_latents(latent: tuple[int, int, int], model: DiTConfig) -> None:
    """Raise ValueError if the codec's latents do not match the transformer's channels and patch size."""
    channels, height, width = latent
    if channels != model.channels:
        raise ValueError(f"the codec's latents have {channels} channels, but model.channels is {model.channels}")
    if height % model.patch or width % model.patch:
        raise ValueError(f"latents of {height} x {width} do not divide into patches: model.patch is {model.patch}")
