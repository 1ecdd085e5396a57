"""TextToImage: text encoder, network and codec as one object that samples images of prompts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.model.codec import Codec, NotFiniteError
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.model.runtime import autocast, rounded_once
from semantic_routing.sampling.clock import NOMINAL, parse_clock
from semantic_routing.sampling.guidance import guided
from semantic_routing.sampling.samplers import SAMPLERS, Callback, SamplerSpelling, noise_for, sampler_name, schedule
from semantic_routing.text.config import TextShape
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.features import TextFeatures

MOST_GUIDANCE = 1000
"""The largest guidance scale; larger ones overflow."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Settings of sampling; the defaults are the paper's (50 Euler steps, guidance scale 6)."""

    steps: int = 50
    """Number of sampling steps."""
    guidance: float = 6.0
    """Scale of classifier-free guidance; 1 turns it off."""
    sampler: SamplerSpelling = "euler"
    """euler and heun integrate the flow; euler-ancestral replaces part of the noise at every step, and renoise all of
    it, which favours modes."""
    shift: float = 1.0
    """Timestep shift: above 1, more of the steps are near the noise."""
    clock: str = NOMINAL
    """Time at which time-dependent routing is evaluated: nominal (the step's own time), shifted (Eq. 11), shifted:SIZE,
    or a calibration file."""
    seed: int = 0
    """Random seed. An image's noise depends only on the seed, its prompt index and its image index."""
    batch: int = 64
    """Images sampled together."""
    compile: bool = False
    """Compile the network: it starts more slowly and its steps are faster. Pixels differ by rounding, also between
    batch sizes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sampler", sampler_name(self.sampler))
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; sampling needs at least 1")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be above 0 and finite")
        check_guidance(self.guidance)


def check_guidance(scale: float) -> None:
    """Raise ValueError unless a guidance scale is finite and at most ``MOST_GUIDANCE``."""
    if not abs(scale) <= MOST_GUIDANCE:
        raise ValueError(f"guidance is {scale}; it must be finite, at most {MOST_GUIDANCE}")


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A trained network with its text encoder and codec, which samples images from prompts. ``load`` returns one."""

    model: Backbone
    encoder: TextEncoder
    codec: Codec
    image_size: int
    """Side of an image in pixels."""
    size: tuple[int, int] | None = None
    """Height and width of the images, if they are not both ``image_size``."""
    null_prompt: str = ""
    """The prompt that stands for "no prompt" in guidance; it replaced dropped prompts in training."""
    bf16: bool = False
    """Whether matrix products run in bfloat16."""
    checkpoint: Path | None = None
    """The folder that the model was loaded from."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's resolved configuration."""
    begun: str | None = None
    """The folder in which the run was started, where its relative paths begin."""
    _encoded: dict[str, TextFeatures] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.size or (self.image_size, self.image_size)

    @property
    def device(self) -> torch.device:
        return self.model.proj_out.weight.device

    def encode(self, prompts: Sequence[str], *, strict: bool = True, packed: bool = False) -> TextFeatures:
        """Encode prompts and put the features on the network's device.

        ``strict`` and ``packed`` are those of ``TextEncoder.encode``. Without autocast, the features have the dtype of
        the network's weights.
        """
        keys = self.model.cfg.strategy.reads_keys
        features = self.encoder.encode(list(prompts), with_kv=keys, strict=strict, packed=packed)
        return features.to(self.device, None if self.bf16 else self.model.proj_out.weight.dtype)

    def null_features(self) -> TextFeatures:
        """Return the features of the null prompt, which is encoded only once."""
        if self.null_prompt not in self._encoded:
            self._encoded[self.null_prompt] = self.encode([self.null_prompt])
        return self._encoded[self.null_prompt]

    def sample(
        self,
        prompts: Sequence[str],
        images: Sequence[tuple[int, int]] | None = None,
        cfg: SampleConfig | None = None,
        callback: Callback | None = None,
    ) -> UInt8[Tensor, "B H W 3"]:
        """Sample one image for each prompt: uint8 RGB, [B, H, W, 3].

        ``images`` holds the (prompt index, image index) of each image, which determine its noise together with
        ``cfg.seed``. By default prompts are numbered from 0, with one image each. ``cfg`` defaults to
        ``SampleConfig()``. ``callback(step, t, x, velocity)`` is called at every step. Raises NotFiniteError, which
        names the prompt and the step, if an image is NaN or infinite.
        """
        cfg = cfg or SampleConfig()
        images = images or [(i, 0) for i in range(len(prompts))]
        finite: list[Tensor] = []

        def watch(step: int, t: Tensor, x: Tensor, v: Tensor) -> None:
            finite.append(v.isfinite().flatten(1).all(1))
            if callback is not None:
                callback(step, t, x, v)

        try:
            return self.codec.decode(self.sample_latents(prompts, images, cfg, watch))
        except NotFiniteError as error:
            place = error.pictures[0]
            bad = (~torch.stack(finite)[:, place]).nonzero().flatten().tolist()
            when = f"from step {bad[0] + 1} of {cfg.steps} on" if bad else "when its latents are decoded"
            raise NotFiniteError(error.pictures, f"the picture of {prompts[place]!r} is not finite {when}") from error

    def sample_latents(
        self,
        prompts: Sequence[str],
        images: Sequence[tuple[int, int]],
        cfg: SampleConfig,
        callback: Callback | None = None,
        features: TextFeatures | None = None,
    ) -> Float[Tensor, " B *latent"]:
        """Sample the latents of the images of ``sample``, [B, C, h, w]; ``callback`` is called at every step.

        ``features`` are the encoded prompts, if you already have them.
        """
        shape = latent_shape(self.codec, self.model.cfg, *self.pixels)
        x = noise_for(cfg.seed, images, shape).to(self.device)
        clock = parse_clock(cfg.clock)
        if clock is not None and not self.model.cfg.strategy.takes_clock:
            raise ValueError(
                f"--clock {cfg.clock}: the routing of arm {self.model.cfg.arm} takes no clock; leave it out"
            )

        learned = self.config.get("distill", {})
        if learned.get("teacher") and cfg.guidance != 1:
            warnings.warn(
                f"this model has learned guidance {learned.get('guidance')} (semroute train --distill.teacher): "
                "sample it with guidance 1",
                stacklevel=2,
            )

        def fresh(step: int) -> Tensor:
            return noise_for(cfg.seed, images, shape, step).to(self.device)

        with torch.no_grad(), autocast(self.device, self.bf16), rounded_once(self.model, self.bf16):
            times = schedule(cfg.steps, cfg.shift)
            features = self.encode(prompts) if features is None else features
            velocity = guided(self.model, features, self.null_features(), cfg.guidance, clock, times)
            return SAMPLERS[cfg.sampler](velocity, x, times, noise=fresh, callback=callback)


def check_encoder(shape: TextShape, cfg: DiTConfig) -> None:
    """Raise ValueError unless a text encoder has the sizes that the transformer was made for."""
    gives, reads = {"layers": len(shape.layers)}, {"layers": cfg.text_layers}
    if cfg.strategy.reads_keys:
        gives |= {"key heads": shape.kv_heads, "head width": shape.head_dim}
        reads |= {"key heads": cfg.kv_heads, "head width": cfg.head_dim}
    else:
        gives |= {"width": shape.width}
        reads |= {"width": cfg.text_width}
    if gives != reads:
        ours, theirs = (", ".join(f"{name} {size}" for name, size in sizes.items()) for sizes in (gives, reads))
        raise ValueError(
            f"the text encoder gives {ours}, but this transformer reads {theirs}: use the encoder it was trained with"
        )


def check_channels(codec: Codec, cfg: DiTConfig) -> None:
    """Raise ValueError unless a codec's latents have as many channels as the transformer's."""
    if codec.channels != cfg.channels:
        source = "the VAE's latents have" if codec.has_posterior else "pixels have"
        raise ValueError(f"{source} {codec.channels} channels, but this transformer draws {cfg.channels}")


def latent_shape(codec: Codec, cfg: DiTConfig, height: int, width: int) -> tuple[int, int, int]:
    """Return the shape (channels, h, w) of an image's latents; raise ValueError if patches do not divide the image."""
    side = codec.factor * cfg.patch
    if any(not isinstance(pixels, int) or pixels < 1 or pixels % side for pixels in (height, width)):
        raise ValueError(
            f"an image of {height!r} x {width!r} pixels does not divide into this transformer's patches of "
            f"{side} x {side} pixels; use multiples of {side}"
        )
    return codec.latent_shape(height, width)
