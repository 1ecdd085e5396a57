"""Tiny diffusers pipelines, and sampling from them with fixed noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import TextToImage
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
