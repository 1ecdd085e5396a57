"""Components of a pipeline: facts that they share, components that do not fit, the VAE."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.interop.transformer import SemanticRoutingTransformer
from semantic_routing.sampling.samplers import noise_for
from tests.helpers.pipelines import SIZES, MakeBundle, draw, quiet


def test_components_that_do_not_fit_are_refused(pipe: SemanticRoutingPipeline, make_bundle: MakeBundle) -> None:
    parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer, "scheduler": pipe.scheduler}
    facts = {"image_size": 16, "null_prompt": "gray", "text": {"layers": "all"}}

    def around(arm: str = "depth", **sizes: Any) -> SemanticRoutingPipeline:
        transformer = SemanticRoutingTransformer(**asdict(replace(SIZES, arm=arm, **sizes)))
        return SemanticRoutingPipeline(**parts, transformer=transformer, **facts)

    with pytest.raises(ValueError, match="gives layers 2, width 64, but this transformer reads layers 2, width 32"):
        around(text_width=32)
    with pytest.raises(ValueError, match="gives layers 2, width 64, but this transformer reads layers 9, width 64"):
        around(text_layers=9)
    with pytest.raises(
        ValueError, match="head width 32, but this transformer reads layers 2, key heads 1, head width 16"
    ):
        around("fusedit", head_dim=16)
    with pytest.raises(ValueError, match="pixels have 3 channels, but this transformer draws 4"):
        around(channels=4)
    with pytest.raises(ValueError, match="unknown precision 'fp8'; use one of auto, bf16, fp32"):
        SemanticRoutingPipeline(**parts, transformer=pipe.transformer, precision="fp8")
    with pytest.raises(ValueError, match=r"layer 3 of .* is asked for, but the text encoder holds 2 layers"):
        SemanticRoutingPipeline(**parts, transformer=pipe.transformer, text={"layers": [2, 3], "total_layers": 8})
    pipe.text_encoder = make_bundle(layers="1").encoder.model  # replaced later
    with pytest.raises(ValueError, match=r"layer 2 of .* holds 1 layers"):
        draw(pipe)


@pytest.mark.behaviour(
    "diffusers",
    when="a pipeline is built from another's components, `SemanticRoutingPipeline(**pipe.components)`",
    then="it samples the same images: size, null prompt, text settings and precision are in the transformer's config",
)
@pytest.mark.parametrize("latent", [False, True])
def test_a_pipeline_of_anothers_components_samples_the_same(make_bundle: MakeBundle, latent: bool) -> None:
    bundle = make_bundle(layers="2", latent=latent, patch=2)
    bundle = replace(bundle, config={"precision": "fp32", "text": {"name_or_path": "tiny"}})
    bundle.encoder.config = replace(bundle.encoder.config, prefix="Draw this: ")
    pipe = quiet(make_pipeline(bundle))
    again = quiet(SemanticRoutingPipeline(**pipe.components))
    for name in ("image_size", "null_prompt", "text", "precision"):
        assert again.config[name] == pipe.config[name]
    assert again.config.text["prefix"] == "Draw this: "
    assert torch.equal(draw(again), draw(pipe))


def test_the_transformers_folder_holds_the_facts(pipe: SemanticRoutingPipeline, tmp_path: Path) -> None:
    pipe.transformer.save_pretrained(str(tmp_path))
    parts = pipe.components | {"transformer": SemanticRoutingTransformer.from_pretrained(str(tmp_path))}
    again = quiet(SemanticRoutingPipeline(**parts))
    assert (again.config.image_size, again.config.null_prompt) == (16, "gray")
    assert torch.equal(draw(again), draw(pipe))
    assert SemanticRoutingPipeline(**parts, null_prompt="blue").config.null_prompt == "blue"


@pytest.mark.behaviour(
    "diffusers",
    when="a pipeline is built from a transformer whose config lacks image size, null prompt or text settings",
    then="one line names the missing arguments",
)
def test_missing_facts_are_named(pipe: SemanticRoutingPipeline) -> None:
    parts = pipe.components | {"transformer": SemanticRoutingTransformer(**asdict(SIZES))}
    with pytest.raises(ValueError, match="lacks image_size and null_prompt and text: give the pipeline"):
        SemanticRoutingPipeline(**parts)
    with pytest.raises(ValueError, match="lacks null_prompt: give the pipeline"):
        SemanticRoutingPipeline(**parts, image_size=16, text={"layers": "all"})


def test_latents_of_another_kind_are_refused(make_bundle: MakeBundle, pipe: SemanticRoutingPipeline) -> None:
    latent = make_pipeline(make_bundle(latent=True, patch=2))
    with pytest.raises(
        ValueError, match=r"samples latents of a VAE \(factor 2.* but the pipeline decodes pixels: use the VAE"
    ):
        SemanticRoutingPipeline(**(latent.components | {"vae": None}))
    with pytest.raises(ValueError, match=r"samples pixels, but the pipeline decodes latents of a VAE .*: use vae=None"):
        SemanticRoutingPipeline(**(pipe.components | {"vae": latent.vae}))
    latent.vae.register_to_config(scaling_factor=2.0)
    with pytest.raises(ValueError, match=r"decodes latents of a VAE .*scale 2"):
        draw(latent)


def test_vae_tiling_changes_pixels_until_it_is_disabled(make_bundle: MakeBundle, pipe: SemanticRoutingPipeline) -> None:
    latent = quiet(make_pipeline(make_bundle(latent=True, patch=2)))
    noise = noise_for(0, [(0, 0)], latent.latent_shape(64, 64))

    def image() -> Any:
        size = {"height": 64, "width": 64, "latents": noise}
        return latent("a star", num_inference_steps=1, output_type="np", **size).images

    whole = image()
    latent.enable_vae_tiling()
    assert latent.vae.use_tiling
    tiled = image()
    assert tiled.shape == whole.shape
    assert not np.array_equal(tiled, whole)
    latent.disable_vae_tiling()
    assert np.array_equal(image(), whole)
    with pytest.raises(ValueError, match="samples pixels and has no VAE to tile"):
        pipe.enable_vae_tiling()


def test_attributes_of_diffusers_pipelines_work(make_bundle: MakeBundle, pipe: SemanticRoutingPipeline) -> None:
    latent = quiet(make_pipeline(make_bundle(latent=True, patch=2)))
    assert (pipe.vae_scale_factor, latent.vae_scale_factor) == (1, 2)
    images = pipe.image_processor.postprocess(draw(pipe), output_type="np")
    assert np.abs(images - draw(pipe, output_type="np")).max() < 0.01
    whole = draw(latent, output_type="np")
    latent.enable_vae_slicing()
    assert latent.vae.use_slicing
    assert np.abs(draw(latent, output_type="np") - whole).max() < 0.01
    latent.disable_vae_slicing()
    with pytest.raises(ValueError, match="has no VAE to slice"):
        pipe.enable_vae_slicing()
    assert torch.equal(draw(SemanticRoutingPipeline.from_pipe(pipe)), draw(pipe))
