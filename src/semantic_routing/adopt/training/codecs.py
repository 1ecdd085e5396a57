"""The codec of a pipeline's own VAE."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.model.codec import Codec, VAECodec, to_pixels, to_signed


class DCCodec(Codec):
    """Scaled latents of a diffusers ``AutoencoderDC``, which has no posterior, as of Sana."""

    has_posterior = False

    def __init__(self, vae: Any) -> None:
        self.vae, self.scale = vae, vae.config.scaling_factor
        self.channels = vae.config.latent_channels
        self.factor = 2 ** (len(vae.config.encoder_block_out_channels) - 1)

    @torch.no_grad()
    def encode(
        self, images: UInt8[Tensor, "B H W 3"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        self.latent_shape(*images.shape[1:3])
        return self.vae.encode(to_signed(images).to(self.vae.dtype)).latent.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> UInt8[Tensor, "B H W 3"]:
        return to_pixels(self.vae.decode((latents / self.scale).to(self.vae.dtype)).sample)


def codec_of(pipe: Any) -> Codec:
    """Return the codec of a pipeline's VAE, which computes in float32; raise ValueError if it cannot be used."""
    vae: Any = getattr(pipe, "vae", None)
    channels = pipe.transformer.config.in_channels
    name = type(vae).__name__
    if name not in ("AutoencoderKL", "AutoencoderDC"):
        found = "has no VAE" if vae is None else f"has the VAE {name}"
        raise ValueError(f"this {type(pipe).__name__} {found}; training needs an AutoencoderKL or an AutoencoderDC")
    vae = vae.float()
    codec: Codec = VAECodec(vae) if name == "AutoencoderKL" else DCCodec(vae)
    if codec.channels != channels:
        raise ValueError(
            f"the VAE has latents of {codec.channels} channels, but the transformer reads {channels}: use the VAE of "
            "its pipeline"
        )
    return codec
