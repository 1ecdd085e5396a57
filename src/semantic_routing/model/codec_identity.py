"""Facts that determine a VAE's latents: those that must be the same, and those that change only the last bits."""

from __future__ import annotations

import json
from hashlib import blake2b
from importlib.metadata import version

import torch

from semantic_routing.model.codec import CodecConfig, VAECodec
from semantic_routing.text.identity import machine

Facts = dict[str, str]


def vae_facts(codec: VAECodec, cfg: CodecConfig) -> Facts:
    """Return digests of a VAE's weights and configuration, its floating-point type and its tiling."""
    settings = {name: value for name, value in codec.vae.config.items() if not name.startswith("_")}
    weights = blake2b(digest_size=20)
    for name, x in sorted(codec.vae.state_dict().items()):
        weights.update(repr((name, tuple(x.shape), x.dtype)).encode())
        weights.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return {
        "weights": weights.hexdigest(),
        "configuration": blake2b(
            json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=20
        ).hexdigest(),
        "dtype": str(codec.vae.dtype).removeprefix("torch."),
        "tiling": "yes" if cfg.tiling else "no",
    }


def rounding_facts(codec: VAECodec, cfg: CodecConfig) -> Facts:
    """Return the libraries, the processor and the other facts that change latents only by rounding."""
    place = next(codec.vae.parameters()).device
    libraries = {name: version(name) for name in ("torch", "diffusers", "pillow")}
    return libraries | {"processor": " ".join(map(str, machine(place))), "slicing": "yes" if cfg.slicing else "no"}
