"""Images to latents and back: the pixels themselves, or the autoencoder of a latent diffusion model.

Images are uint8 RGB with channels last, as files have them; latents are float32 with channels first and of
about unit variance, as networks want them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.common.extras import require

HUB_NAME = r"[\w-][\w.-]*/[\w.-]+"
"""Names on the Hugging Face hub, unlike those of folders that begin with a dot or have more parts."""


class NotFiniteError(ValueError):
    """Pictures that are no pictures: NaN and infinity would be drawn as black or white."""

    def __init__(self, pictures: list[int], message: str = "") -> None:
        """``pictures`` are their places in the batch."""
        super().__init__(message or f"pictures {pictures} of the batch are not finite (NaN or infinity)")
        self.pictures = pictures


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """What a model's latents are."""

    kind: Literal["pixels", "vae"] = "pixels"
    """Pixels scaled to [-1, 1], or latents of a diffusers ``AutoencoderKL`` such as Stable Diffusion 3's."""
    name_or_path: str = ""
    """Of the VAE: a folder written by ``save_pretrained``, or a name on the hub. Safetensors only."""
    subfolder: str = ""
    """Where in that folder or repository the VAE is; "vae" in a whole diffusers pipeline."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Floating-point type of the VAE; less than float32 costs fidelity; some overflow in float16."""
    tiling: bool = False
    """Code pictures larger than the VAE's own size in overlapping tiles: less memory, other pixels."""
    slicing: bool = False
    """Code the pictures of a batch one after another: less memory, same pixels."""

    def __post_init__(self) -> None:
        if self.kind == "vae" and not self.name_or_path:
            raise ValueError('a codec of kind "vae" needs name_or_path, the folder or hub name of the VAE')


class Codec(ABC):
    """Turns images into the latents that a diffusion model learns, and back."""

    channels: int
    """Channels C of a latent."""
    factor: int
    """Pixels along one side of a latent position."""
    has_posterior: bool
    """Whether ``encode`` can sample, and training should give it noise."""

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of ``height`` x ``width`` pixels, square by default."""
        width = height if width is None else width
        if min(height, width) < 1 or height % self.factor or width % self.factor:
            raise ValueError(
                f"an image of {height} x {width} pixels does not divide into the codec's latent positions of "
                f"{self.factor} x {self.factor} pixels; use multiples of {self.factor}"
            )
        return self.channels, height // self.factor, width // self.factor

    @abstractmethod
    def encode(
        self, images: UInt8[Tensor, "B H W 3"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Latents of images: the posterior's mean, or a sample of it made from standard normal ``noise``."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B H W 3"]:
        """Draw the images of latents, clamped to what a pixel can be and rounded; NotFiniteError names those of NaN."""

    def to(self, device: torch.device | str) -> Codec:
        """Move to a device, where images and latents are then expected."""
        return self


def make_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """The codec that a configuration describes; raises ValueError where there is no such VAE."""
    if config.kind == "pixels":
        return PixelCodec()
    return VAECodec.from_pretrained(config).to(device)


class PixelCodec(Codec):
    """Pixels scaled to [-1, 1]; decoding gives back exactly what was encoded."""

    channels = 3
    factor = 1
    has_posterior = False

    def encode(
        self, images: UInt8[Tensor, "B H W 3"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Pixels in [-1, 1]; ``noise`` is not used."""
        return _to_signed(images)

    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B H W 3"]:
        return _to_pixels(latents)


class VAECodec(Codec):
    """Latents ``(z - shift) * scale`` of a diffusers ``AutoencoderKL``; shift and scale are the VAE's own."""

    has_posterior = True

    def __init__(self, vae: Any) -> None:
        """Prefer ``from_pretrained``. ``vae`` is an ``AutoencoderKL`` of RGB images."""
        config = vae.config
        if config.in_channels != 3 or config.out_channels != 3:
            raise ValueError(
                f"the VAE reads {config.in_channels} channels and draws {config.out_channels}; expected 3 and 3, RGB"
            )
        if config.latents_mean is not None or config.latents_std is not None:
            raise ValueError("the VAE scales each channel by itself (latents_mean); expected one shift and scale")
        self.vae = vae.eval().requires_grad_(False)
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.shift = config.shift_factor or 0.0
        self.scale = config.scaling_factor

    @classmethod
    def from_pretrained(cls, config: CodecConfig) -> VAECodec:
        """Load the VAE that ``config`` names, from a folder or the hub.

        Raises ValueError where diffusers is missing, there is no such VAE, or its weights are not safetensors
        or do not fit.
        """
        vae = _load_vae(config)
        if config.tiling:
            vae.enable_tiling()
        if config.slicing:
            vae.enable_slicing()
        return cls(vae)

    def to(self, device: torch.device | str) -> VAECodec:
        """Move the VAE to a device."""
        self.vae.to(device)
        return self

    @torch.no_grad()
    def encode(
        self, images: UInt8[Tensor, "B H W 3"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        self.latent_shape(*images.shape[1:3])  # the VAE itself would cut odd edges off in silence
        posterior = self.vae.encode(_to_signed(images).to(self.vae.dtype)).latent_dist
        z = posterior.mean.float()
        if noise is not None:
            z = z + posterior.std.float() * noise
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B H W 3"]:
        z = latents.float() / self.scale + self.shift
        return _to_pixels(self.vae.decode(z.to(self.vae.dtype)).sample)


def _to_signed(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def check_pictures(pictures: Float[Tensor, " B *picture"]) -> None:
    """Raise NotFiniteError where pictures or their latents hold NaN or infinity."""
    if not (finite := pictures.isfinite().flatten(1).all(1)).all():
        raise NotFiniteError((~finite).nonzero().flatten().tolist())


def _to_pixels(signed: Tensor) -> Tensor:
    check_pictures(signed)
    pixels = (signed.float() + 1) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _load_vae(config: CodecConfig) -> Any:
    AutoencoderKL = require("diffusers.models.autoencoders", what="a VAE", extra="diffusers").AutoencoderKL
    place = str(Path(config.name_or_path) / config.subfolder) if config.subfolder else config.name_or_path
    if not Path(place).is_dir() and not re.fullmatch(HUB_NAME, config.name_or_path):
        raise ValueError(f"no VAE at {place!r}; expected a folder or, on the Hugging Face hub, owner/name")
    try:
        settings = AutoencoderKL.load_config(config.name_or_path, subfolder=config.subfolder or None)
        if settings.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"it is of the class {settings.get('_class_name')}, not AutoencoderKL")
        vae, report = AutoencoderKL.from_pretrained(
            config.name_or_path,
            subfolder=config.subfolder or None,
            torch_dtype=getattr(torch, config.dtype),
            use_safetensors=True,
            low_cpu_mem_usage=False,  # True needs accelerate; a VAE is small
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"no VAE could be loaded from {place!r}: {reason}") from error
    misfits = {name: keys for name, keys in report.items() if keys}
    if misfits:
        raise ValueError(f"the weights of the VAE in {place!r} do not fit its configuration: {misfits}")
    return vae
