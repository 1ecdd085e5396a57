"""The latents of a training batch: cached ones if there are any, otherwise those that the codec computes."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.data.batch import Batch
from semantic_routing.data.latents import KeptLatents, check_facts
from semantic_routing.model.codec import Codec, CodecConfig, VAECodec
from semantic_routing.model.codec_identity import rounding_facts, vae_facts


def latents_folder(cfg: CodecConfig) -> Path:
    """Return the folder of a run's cached latents."""
    return Path(cfg.keep_on_disk).expanduser()


def kept_latents(cfg: CodecConfig) -> KeptLatents | None:
    """Open the cached latents of a run; None if it has none."""
    return KeptLatents(latents_folder(cfg)) if cfg.keep_on_disk else None


def check_kept(cfg: CodecConfig, codec: Codec) -> list[str]:
    """Return messages about a run's cached latents; raise ValueError if they belong to another VAE than the run's."""
    kept = kept_latents(cfg)
    if kept is None:
        return []
    assert isinstance(codec, VAECodec)
    facts = kept.facts()
    if facts is None:
        return [f"there are no latents in {kept.folder}: semroute data encode --latents writes them before training"]
    return check_facts(kept.folder, facts, vae_facts(codec, cfg), rounding_facts(codec, cfg))


def batch_latents(codec: Codec, batch: Batch[Tensor], device: torch.device | None = None) -> Float[Tensor, "B C h w"]:
    """Return a batch's latents on ``device``, by default the images'; images with cached latents are not encoded."""
    device = device or batch.images.device
    noise = None if batch.posterior_noise is None else batch.posterior_noise.to(device)
    if batch.posteriors is None or batch.kept is None:
        return codec.encode(batch.images.to(device), noise)
    assert isinstance(codec, VAECodec)
    missing = (~batch.kept).nonzero().flatten().tolist()
    posteriors = codec.stored(batch.posteriors.to(device))
    if missing:
        posteriors[missing] = codec.posterior(batch.images[missing].to(device))
    return codec.sample(posteriors, noise)
