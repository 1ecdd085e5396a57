"""TextToImage: text encoder, network and codec as one object that draws prompts."""

from __future__ import annotations

import math
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
"""Scales of guidance beyond it only overflow."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How images are sampled; the defaults are the paper's."""

    steps: int = 50
    """Steps of the sampler."""
    guidance: float = 6.0
    """Scale of classifier-free guidance; 1 is none."""
    sampler: SamplerSpelling = "euler"
    """euler and heun integrate the flow, euler-ancestral renews part of the noise, renoise all of it (seeks modes)."""
    shift: float = 1.0
    """Above 1, more steps near the noise."""
    clock: str = NOMINAL
    """The time that time-dependent routing is told: nominal, shifted (Eq. 11), shifted:SIZE, or a calibration file."""
    seed: int = 0
    """Run seed: with prompt index and image index it decides an image's noise."""
    batch: int = 64
    """Images sampled together."""
    compile: bool = False
    """Compile the network: slower to start, faster steps; pixels differ by rounding, also between batch sizes."""

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
    """Raise ValueError for a scale that leaves no picture finite."""
    if not abs(scale) <= MOST_GUIDANCE:
        raise ValueError(f"guidance is {scale}; it must be finite, at most {MOST_GUIDANCE}")


@dataclass(frozen=True, kw_only=True)
class TextToImage:
    """A trained model with all that sampling from it needs."""

    model: Backbone
    encoder: TextEncoder
    codec: Codec
    image_size: int
    """Side of an image in pixels."""
    size: tuple[int, int] | None = None
    """Height and width of the images to draw, if not ``image_size`` both."""
    null_prompt: str = ""
    """What stands for "no prompt" in guidance: what dropped prompts were replaced by in training."""
    bf16: bool = False
    """Whether products run in bfloat16."""
    checkpoint: Path | None = None
    """Where it was loaded from."""
    config: dict[str, Any] = field(default_factory=dict)
    """The run's resolved configuration."""
    _encoded: dict[str, TextFeatures] = field(default_factory=dict, repr=False, compare=False)

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of its images."""
        return self.size or (self.image_size, self.image_size)

    @property
    def device(self) -> torch.device:
        return self.model.proj_out.weight.device

    def encode(self, prompts: Sequence[str], *, strict: bool = True) -> TextFeatures:
        """Return what this model's text encoder says about the prompts, on the model's device.

        In the weights' own type where autocast will not bring the two together. ``strict`` as of the encoder.
        """
        keys = self.model.cfg.strategy.reads_keys
        features = self.encoder.encode(list(prompts), with_kv=keys, strict=strict)
        return features.to(self.device, None if self.bf16 else self.model.proj_out.weight.dtype)

    def null_features(self) -> TextFeatures:
        """What the text encoder says about the null prompt, asked once."""
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
        """Draw one image for each prompt, in bytes.

        ``images`` names each by (prompt index, image index), from which its noise follows; by default the prompts are
        counted, one image each. ``cfg`` says how, by default as the paper does. ``callback`` sees every step.
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
            when = f"from step {bad[0] + 1} of {cfg.steps} on" if bad else "where its latents are decoded"
            raise NotFiniteError(error.pictures, f"the picture of {prompts[place]!r} is not finite {when}") from error

    def sample_latents(
        self,
        prompts: Sequence[str],
        images: Sequence[tuple[int, int]],
        cfg: SampleConfig,
        callback: Callback | None = None,
    ) -> Float[Tensor, " B *latent"]:
        """The latents of ``sample``'s images; ``callback`` sees every step."""
        shape = latent_shape(self.codec, self.model.cfg, *self.pixels)
        x = noise_for(cfg.seed, images, shape).to(self.device)
        clock = parse_clock(cfg.clock)
        if clock is not None and not self.model.cfg.strategy.takes_clock:
            raise ValueError(f"--clock {cfg.clock}: the routing of arm {self.model.cfg.arm} goes by no given time")

        def fresh(step: int) -> Tensor:
            return noise_for(cfg.seed, images, shape, step).to(self.device)

        with torch.no_grad(), autocast(self.device, self.bf16), rounded_once(self.model, self.bf16):
            times = schedule(cfg.steps, cfg.shift)
            velocity = guided(self.model, self.encode(prompts), self.null_features(), cfg.guidance, clock, times)
            return SAMPLERS[cfg.sampler](velocity, x, times, noise=fresh, callback=callback)


def check_encoder(shape: TextShape, cfg: DiTConfig) -> None:
    """ValueError where a text encoder is not like the one that the transformer was made for."""
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
    """ValueError where a codec's latents are not what the transformer draws."""
    if codec.channels != cfg.channels:
        source = "the VAE's latents have" if codec.has_posterior else "pixels have"
        raise ValueError(f"{source} {codec.channels} channels, but this transformer draws {cfg.channels}")


def latent_shape(codec: Codec, cfg: DiTConfig, height: int, width: int) -> tuple[int, int, int]:
    """Shape (channels, h, w) of the latents of an image in pixels; ValueError where patches do not divide it."""
    side = codec.factor * cfg.patch
    if any(not isinstance(pixels, int) or pixels < 1 or pixels % side for pixels in (height, width)):
        raise ValueError(
            f"an image of {height!r} x {width!r} pixels does not divide into this transformer's patches of "
            f"{side} x {side} pixels; use multiples of {side}"
        )
    return codec.latent_shape(height, width)
