"""Tiny diffusers pipelines, and sampling from them with fixed noise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from semantic_routing.adopt import adopt
from semantic_routing.common.device import has_bfloat16
from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import PixelCodec, VAECodec
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from tests.helpers.networks import tiny_config

PROMPTS = ["a red square above a white circle", "a blue star"]
STEPS, GUIDANCE = 5, 3.0
SIZES = tiny_config(depth=2, width=24, head_dim=32, mlp_width=40, patch=4, text_width=64, text_layers=2)
"""Sizes that fit the tiny text encoder."""
MakeBundle = Callable[..., TextToImage]


def tiny_vae() -> AutoencoderKL:
    """Return a random VAE of factor 2 with 3 latent channels."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=3, sample_size=16, shift_factor=0.1, **blocks
    )


def random_bundle(
    tiny_encoder: Path, arm: str = "depth", *, latent: bool = False, layers: str = "all", side: int = 16, **sizes: Any
) -> TextToImage:
    """Return a model with random weights, a text encoder and a codec."""
    torch.manual_seed(0)
    encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(tiny_encoder), layers=layers))
    model = make_model(replace(SIZES, arm=arm, text_layers=encoder.num_layers, **sizes))
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return TextToImage(
        model=model.eval().requires_grad_(False),
        encoder=encoder,
        codec=VAECodec(tiny_vae()) if latent else PixelCodec(),
        image_size=side,
        null_prompt="gray",
        bf16=has_bfloat16(torch.device("cpu")),
    )


def save_random_routing(pipe: Any, folder: Path) -> None:
    """Adopt a pipeline and save the routing with random weights."""
    routing = adopt(pipe, "depth")
    with torch.no_grad():
        for p in routing.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    routing.save(folder)


def save_adopted(bundle: TextToImage, folder: Path) -> Path:
    """Save a pipeline, and a random routing of its blocks as semroute adopt train leaves it; return its folder."""
    pipe = quiet(make_pipeline(bundle))
    pipe.save_pretrained(folder / "base")
    save_random_routing(pipe, folder / "routing")
    settings = {"pipeline": str(folder / "base"), "data": {"paths": ["shapes"]}}
    (folder / "routing/config.json").write_text(json.dumps(settings))
    return folder / "routing"


def quiet(pipe: SemanticRoutingPipeline) -> SemanticRoutingPipeline:
    """Turn the progress bar off."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def exact(pipe: SemanticRoutingPipeline) -> SemanticRoutingPipeline:
    """Use float32 products, for comparisons up to rounding."""
    pipe.register_to_config(precision="fp32")
    return pipe


def draw(pipe: SemanticRoutingPipeline, **options: Any) -> Tensor:
    """Sample the latents of the two prompts from fixed noise."""
    noise = noise_for(0, [(0, 0), (1, 0)], pipe.latent_shape())
    defaults = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise, "output_type": "latent"}
    return pipe(PROMPTS, **(defaults | options)).images
