"""Fixtures of the tests of pipelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from semantic_routing.common.device import has_bfloat16
from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.model.build import make_model
from semantic_routing.model.codec import PixelCodec, VAECodec
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.text.config import TextEncoderConfig
from semantic_routing.text.encoder import TextEncoder
from tests.helpers.pipelines import SIZES, MakeBundle, quiet, tiny_vae


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def make_bundle(tiny_encoder: Path) -> MakeBundle:
    """(arm, latent=..., layers=..., **sizes) -> a model with random weights, a text encoder and a codec."""

    def make(arm: str = "depth", *, latent: bool = False, layers: str = "all", **sizes: Any) -> TextToImage:
        torch.manual_seed(0)
        encoder = TextEncoder.from_pretrained(TextEncoderConfig(name_or_path=str(tiny_encoder), layers=layers))
        model = make_model(replace(SIZES, arm=arm, text_layers=encoder.num_layers, **sizes))
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        return TextToImage(
            model=model.eval().requires_grad_(False),
            encoder=encoder,
            codec=VAECodec(tiny_vae()) if latent else PixelCodec(),
            image_size=16,
            null_prompt="gray",
            bf16=has_bfloat16(torch.device("cpu")),
        )

    return make


@pytest.fixture
def pipe(make_bundle: MakeBundle) -> SemanticRoutingPipeline:
    return quiet(make_pipeline(make_bundle()))
