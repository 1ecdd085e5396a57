"""The diffusers pipeline samples the same pixels as this program, before and after it is saved."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.interop.transformer import SemanticRoutingTransformer
from semantic_routing.model.arms import PAPER_ARMS
from semantic_routing.model.codec import NotFiniteError
from semantic_routing.model.dit import DiTConfig
from semantic_routing.sampling.samplers import noise_for
from semantic_routing.sampling.text_to_image import SampleConfig
from tests.helpers.pipelines import GUIDANCE, PROMPTS, SIZES, STEPS, MakeBundle, draw, exact, quiet


@pytest.mark.parametrize("guidance", [1.0, GUIDANCE])
@pytest.mark.parametrize("arm", [*PAPER_ARMS, "depth-heads-kv"])
def test_pixels_equal_those_of_sample(make_bundle: MakeBundle, arm: str, guidance: float) -> None:
    bundle = make_bundle(arm)
    names = [(0, 0), (1, 0)]
    expected = bundle.sample(PROMPTS, names, SampleConfig(steps=STEPS, guidance=guidance, seed=3)).numpy()
    assert expected.std() > 20
    pipe = quiet(make_pipeline(bundle))
    noise = noise_for(3, names, pipe.latent_shape())
    images = pipe(PROMPTS, num_inference_steps=STEPS, guidance_scale=guidance, latents=noise).images
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), expected)


@pytest.mark.parametrize("sizes", [{"conditioning": "adaln-zero"}, {"prediction": "image"}])
def test_pixels_of_latent_and_conditioned_models(make_bundle: MakeBundle, sizes: dict[str, str]) -> None:
    bundle = make_bundle(latent=True, layers="2", patch=2, **sizes)
    cfg = SampleConfig(steps=STEPS, guidance=GUIDANCE)
    expected = bundle.sample(PROMPTS, [(0, 0), (1, 0)], cfg).numpy()
    images = draw(quiet(make_pipeline(bundle)), output_type="np")
    assert np.array_equal((images * 255).round().astype(np.uint8), expected)


@pytest.mark.parametrize("arm", ["depth", "fusedit"])
def test_pixels_of_a_narrow_text_encoder_with_wide_products(make_bundle: MakeBundle, arm: str) -> None:
    bundle = replace(make_bundle(arm), bf16=False, config={"precision": "fp32"})
    bundle.encoder.model.to(torch.bfloat16)
    expected = bundle.sample(PROMPTS, [(0, 0), (1, 0)], SampleConfig(steps=STEPS, guidance=GUIDANCE)).numpy()
    images = draw(quiet(make_pipeline(bundle)), output_type="np")
    assert np.array_equal((images * 255).round().astype(np.uint8), expected)


def test_images_of_one_prompt_follow_each_other(pipe: SemanticRoutingPipeline) -> None:
    noise = noise_for(0, [(0, 0), (0, 1), (1, 0), (1, 1)], pipe.latent_shape())
    four = draw(exact(pipe), latents=noise, num_images_per_prompt=2, negative_prompt=["gray", "a star"])
    for i in range(4):
        one = pipe(
            PROMPTS[i // 2],
            ["gray", "a star"][i // 2],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise[i : i + 1],
            output_type="latent",
        ).images
        torch.testing.assert_close(four[i : i + 1], one, atol=1e-4, rtol=1e-4)


def test_a_negative_prompt_replaces_the_null_prompt(pipe: SemanticRoutingPipeline) -> None:
    default = draw(pipe)
    assert torch.equal(draw(pipe, negative_prompt="gray"), default)
    assert torch.equal(draw(pipe, negative_prompt=["gray"] * 2), default)
    assert not torch.equal(draw(pipe, negative_prompt="a green circle"), default)


@pytest.mark.parametrize(("arm", "once"), [("depth", True), ("joint", False)])
def test_text_is_encoded_once_and_prepared_again_only_if_time_matters(
    make_bundle: MakeBundle, arm: str, once: bool
) -> None:
    pipe = quiet(make_pipeline(make_bundle(arm)))
    runs: list[Any] = []
    pipe.text_encoder.register_forward_hook(lambda module, *_: runs.append(module))
    expected = draw(pipe)
    assert len(runs) == 2  # the prompts and the null prompt

    def change_the_projection_of_text(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        pipe.transformer.backbone.text_proj.weight.neg_()
        return tensors

    assert torch.equal(draw(pipe, callback_on_step_end=change_the_projection_of_text), expected) is once


def test_a_saved_pipeline_samples_the_same(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = quiet(make_pipeline(make_bundle(latent=True, layers="1", patch=2)))
    pipe.save_pretrained(str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model_index.json", "pipeline.py", "text_encoder", "tokenizer", "transformer", "scheduler", "vae"}
    capsys.readouterr()
    again = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path)))
    assert "annotation" not in capsys.readouterr().err  # diffusers warns about types that it does not understand
    assert again.config.text["total_layers"] == 2
    assert torch.equal(draw(again), draw(pipe))


def test_the_configuration_is_that_of_the_network(tmp_path: Path) -> None:
    transformer = SemanticRoutingTransformer(**asdict(SIZES))
    transformer.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: value for key, value in config.items() if key[0] != "_"} == asdict(SIZES) | {"facts": None}
    assert SemanticRoutingTransformer.from_pretrained(str(tmp_path)).backbone.cfg == SIZES
    with torch.device("meta"):
        assert SemanticRoutingTransformer().backbone.cfg == DiTConfig()


def test_a_bfloat16_pipeline_keeps_its_router_in_float32(make_bundle: MakeBundle, tmp_path: Path) -> None:
    pipe = quiet(make_pipeline(make_bundle("joint")))
    expected = draw(exact(pipe))
    pipe.save_pretrained(str(tmp_path))
    half = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path), dtype=torch.bfloat16))
    types = {name: p.dtype for name, p in half.transformer.named_parameters()}
    assert half.transformer.dtype == half.text_encoder.dtype == torch.bfloat16
    assert {dtype for name, dtype in types.items() if "router" in name} == {torch.float32}
    assert {dtype for name, dtype in types.items() if "router" not in name} == {torch.bfloat16}
    result = draw(half)
    assert result.dtype == torch.float32
    assert (result - expected).square().mean() < 0.02 * expected.square().mean()


@pytest.mark.behaviour(
    "diffusers",
    when="one pipeline without transformer encodes prompts, and one without text encoder samples them",
    then="the images are bitwise those of a complete pipeline",
)
@pytest.mark.parametrize("arm", ["depth", "joint", "fusedit"])
def test_prompts_can_be_encoded_in_another_pipeline(make_bundle: MakeBundle, tmp_path: Path, arm: str) -> None:
    pipe = quiet(make_pipeline(make_bundle(arm)))
    expected = draw(pipe)
    pipe.save_pretrained(str(tmp_path))
    reader = SemanticRoutingPipeline.from_pretrained(str(tmp_path), transformer=None, vae=None)
    embeds = {"prompt_embeds": reader.encode_prompt(PROMPTS), "negative_prompt_embeds": reader.encode_prompt("gray")}
    drawer = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path), text_encoder=None, tokenizer=None))
    noise = noise_for(0, [(0, 0), (1, 0)], pipe.latent_shape())
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "latents": noise, "output_type": "latent"}
    for other in (pipe, drawer):
        assert torch.equal(other(**embeds, **options).images, expected)
    with pytest.raises(ValueError, match="has no text encoder and tokenizer to encode prompts: give prompt_embeds"):
        draw(drawer)
    with pytest.raises(ValueError, match=r"give negative_prompt_embeds, the result of encode_prompt\('gray'\)"):
        drawer(prompt_embeds=embeds["prompt_embeds"])
    with pytest.raises(ValueError, match="has no transformer to sample with"):
        reader("a star")
    drawer.save_pretrained(str(tmp_path / "drawer"))
    again = quiet(SemanticRoutingPipeline.from_pretrained(str(tmp_path / "drawer")))
    assert torch.equal(again(**embeds, **options).images, expected)


@pytest.mark.usefixtures("unchecked")
def test_embeddings_that_do_not_fit_are_refused(pipe: SemanticRoutingPipeline) -> None:
    good = pipe.encode_prompt(["a star"])
    narrow = replace(good, hidden=good.hidden[..., :32])
    for options, message in (
        ({"prompt_embeds": good.hidden}, "prompt_embeds is a Tensor; expected what encode_prompt returns"),
        ({"prompt_embeds": narrow}, "prompt_embeds has 2 layers of width 32, but this transformer reads 2 layers of"),
        ({"prompt_embeds": replace(good, mask=good.mask & False)}, "True on at least one token of every prompt"),
        ({"prompt_embeds": replace(good, hidden=good.hidden * torch.nan)}, "NaN or infinity"),
        ({"prompt": "a", "prompt_embeds": good}, "give either prompt or prompt_embeds"),
        ({"prompt": ["a"] * 3, "negative_prompt_embeds": pipe.encode_prompt(["b"] * 2)}, "2 prompts; expected 1 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**options)


@pytest.mark.behaviour(
    "diffusers",
    when="weights, noise or a LoRA hold NaN",
    then="the call raises an error instead of returning a black image",
)
def test_pictures_that_are_not_finite_are_an_error(pipe: SemanticRoutingPipeline) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        draw(pipe, latents=torch.full((2, 3, 16, 16), torch.inf))
    pipe.transformer.backbone.proj_out.weight.data[0] = torch.nan
    for kind in ("latent", "pil"):
        with pytest.raises(ValueError, match="the images are NaN or infinite"):
            draw(pipe, output_type=kind)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_vae_that_overflows_is_an_error(make_bundle: MakeBundle, value: float) -> None:
    latent = quiet(make_pipeline(make_bundle(latent=True, patch=2)))
    latent.vae.decoder.conv_out.bias.data[0] = value
    assert draw(latent, output_type="latent").isfinite().all()
    for kind in ("pil", "np", "pt"):
        with pytest.raises(NotFiniteError, match=r"the images are NaN or infinite: .* the VAE's"):
            draw(latent, output_type=kind)
