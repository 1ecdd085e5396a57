"""Codecs between images and latents: scaled pixels, or the autoencoder of a latent diffusion model.

Images are uint8 RGB with channels last, as in files. Latents are float32 with channels first and a variance of about 1.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from semantic_routing.common.extras import require
from semantic_routing.common.sizes import parse_bytes

ON_CPU, ELSEWHERE = 1, 8
"""Images in one forward pass of the VAE's encoder on a CPU, and on other devices."""
HUB_NAME = r"[\w-][\w.-]*/[\w.-]+"
"""Pattern of names on the Hugging Face hub (owner/name)."""


class NotFiniteError(ValueError):
    """Error for images or latents that hold NaN or infinity, which would be shown as black or white."""

    def __init__(self, pictures: list[int], message: str = "") -> None:
        """``pictures`` are their indices in the batch."""
        super().__init__(message or f"pictures {pictures} of the batch are not finite (NaN or infinity)")
        self.pictures = pictures


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """The latents of a model: pixels, or the latents of a VAE."""

    kind: Literal["pixels", "vae"] = "pixels"
    """Pixels scaled to [-1, 1], or latents of a diffusers ``AutoencoderKL`` such as Stable Diffusion 3's."""
    name_or_path: str = ""
    """The VAE: a folder written by ``save_pretrained``, or a name on the hub. Only safetensors are read."""
    subfolder: str = ""
    """Subfolder of the VAE in that folder or repository; it is "vae" in a diffusers pipeline."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Floating-point type of the VAE. 16 bits lower the quality, and some VAEs overflow in float16."""
    tiling: bool = False
    """Process images that are larger than the VAE's own size in overlapping tiles: less memory, slightly different
    pixels."""
    slicing: bool = False
    """Process the images of a batch one by one: less memory, same pixels."""
    keep_on_disk: str = ""
    """Folder of cached latents, written before training by `semroute data encode --latents`; training and validation
    read it."""
    keep_on_disk_bytes: str = "500GiB"
    """Maximum size of that folder."""

    def __post_init__(self) -> None:
        if self.kind == "vae" and not self.name_or_path:
            raise ValueError('a codec of kind "vae" needs name_or_path, the folder or hub name of the VAE')
        if self.kind == "pixels" and self.keep_on_disk:
            raise ValueError("codec.keep_on_disk holds latents of a VAE: leave it out for pixels")
        parse_bytes(self.keep_on_disk_bytes)


class Codec(ABC):
    """Encoder from images to the latents that a diffusion model generates, and decoder back to images."""

    channels: int
    """Channels of a latent, C."""
    factor: int
    """Side in pixels of the square that one latent position covers."""
    has_posterior: bool
    """Whether ``encode`` samples a posterior, for which training passes noise."""

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latents of an image of ``height`` x ``width`` pixels, square by default.

        Raises ValueError if the size is not a multiple of ``factor``.
        """
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
        """Return the latents of uint8 images: the posterior's mean, or its sample with standard normal ``noise``."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B H W 3"]:
        """Return the images of latents, clamped and rounded to uint8; raise NotFiniteError for NaN or infinity."""

    def to(self, device: torch.device | str) -> Codec:
        """Move the codec to a device; images and latents must then be on it."""
        return self


def make_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """Return the codec that ``config`` describes; raise ValueError if its VAE cannot be loaded."""
    if config.kind == "pixels":
        return PixelCodec()
    return VAECodec.from_pretrained(config).to(device)


class PixelCodec(Codec):
    """Pixels scaled to [-1, 1]. Decoding inverts encoding exactly."""

    channels = 3
    factor = 1
    has_posterior = False

    def encode(
        self, images: UInt8[Tensor, "B H W 3"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Return pixels in [-1, 1]; ``noise`` is ignored."""
        return to_signed(images)

    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B H W 3"]:
        return to_pixels(latents)


class VAECodec(Codec):
    """Latents ``(z - shift) * scale`` of a diffusers ``AutoencoderKL``, with shift and scale from its configuration."""

    has_posterior = True

    def __init__(self, vae: Any) -> None:
        """Wrap ``vae``, an ``AutoencoderKL`` of RGB images. Prefer ``from_pretrained``."""
        config = vae.config
        if config.in_channels != 3 or config.out_channels != 3:
            raise ValueError(
                f"the VAE reads {config.in_channels} channels and writes {config.out_channels}; use one for RGB images"
            )
        if config.latents_mean is not None or config.latents_std is not None:
            raise ValueError(
                "the VAE scales each channel separately (latents_mean); use one with a single shift and scale"
            )
        self.vae = vae.eval().requires_grad_(False)
        self.channels = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.shift = config.shift_factor or 0.0
        self.scale = config.scaling_factor

    @classmethod
    def from_pretrained(cls, config: CodecConfig) -> VAECodec:
        """Load the VAE that ``config`` names, from a folder or the hub.

        Raise ValueError if diffusers or the VAE is missing, or if its weights are not safetensors or do not fit.
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

    def encode(
        self, images: UInt8[Tensor, "B H W 3"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        return self.sample(self.posterior(images), noise)

    @torch.no_grad()
    def posterior(self, images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 2 C h w"]:
        """Return the mean and the standard deviation of each image's posterior, in the VAE's dtype.

        They are bitwise independent of the rest of the batch. The order of a product's sums follows from its shape, so
        all forward passes of one image size have the same number of images, and the last one is filled up with copies
        of its last image.
        """
        self.latent_shape(*images.shape[1:3])  # the VAE would silently crop odd edges
        size = ON_CPU if images.device.type == "cpu" else ELSEWHERE
        found = []
        for part in images.split(size):
            whole = torch.cat([part, part[-1:].expand(size - len(part), -1, -1, -1)])
            made = self.vae.encode(to_signed(whole).to(self.vae.dtype)).latent_dist
            found.append(torch.stack([made.mean, made.std], dim=1)[: len(part)])
        return torch.cat(found)

    def stored(self, posterior: Shaped[Tensor, "B 2 C h w"]) -> Float[Tensor, "B 2 C h w"]:
        """Convert posteriors that were read from a file; numpy stores bfloat16 as integers."""
        return posterior.view(self.vae.dtype)

    def sample(
        self, posterior: Float[Tensor, "B 2 C h w"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Return the latents of posteriors: their means, or samples with standard normal ``noise``."""
        mean, std = posterior.float().unbind(1)
        z = mean if noise is None else mean + std * noise
        return (z - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B H W 3"]:
        z = latents.float() / self.scale + self.shift
        return to_pixels(self.vae.decode(z.to(self.vae.dtype)).sample)


def to_signed(images: Tensor) -> Tensor:
    """Return uint8 images, channels last, as numbers from -1 to 1, channels first."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def check_pictures(pictures: Float[Tensor, " B *picture"]) -> None:
    """Raise NotFiniteError if pictures or latents hold NaN or infinity."""
    if not (finite := pictures.isfinite().flatten(1).all(1)).all():
        raise NotFiniteError((~finite).nonzero().flatten().tolist())


def to_pixels(signed: Tensor) -> Tensor:
    """Invert ``to_signed``, clamped and rounded; raise NotFiniteError for NaN or infinity."""
    check_pictures(signed)
    pixels = (signed.float() + 1) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _load_vae(config: CodecConfig) -> Any:
    AutoencoderKL = require("diffusers.models.autoencoders", what="a VAE", extra="diffusers").AutoencoderKL
    place = str(Path(config.name_or_path) / config.subfolder) if config.subfolder else config.name_or_path
    if not Path(place).is_dir() and not re.fullmatch(HUB_NAME, config.name_or_path):
        raise ValueError(f"no VAE at {place!r}; use a folder, or owner/name on the Hugging Face hub")
    try:
        settings = AutoencoderKL.load_config(config.name_or_path, subfolder=config.subfolder or None)
        if settings.get("_class_name") != "AutoencoderKL":
            raise ValueError(f"its class is {settings.get('_class_name')}, not AutoencoderKL")
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
        raise ValueError(f"cannot load a VAE from {place!r}: {reason}") from error
    misfits = {name: keys for name, keys in report.items() if keys}
    if misfits:
        raise ValueError(f"the weights of the VAE in {place!r} do not fit its configuration: {misfits}")
    return vae
