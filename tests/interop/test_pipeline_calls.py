"""Arguments, results and callbacks of a pipeline's call."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from semantic_routing.interop.export import make_pipeline
from semantic_routing.interop.pipeline import SemanticRoutingPipeline
from semantic_routing.sampling.samplers import noise_for
from tests.helpers.pipelines import GUIDANCE, PROMPTS, STEPS, MakeBundle, draw, exact, quiet


def test_output_types_are_the_same_pixels(pipe: SemanticRoutingPipeline) -> None:
    pil, array, tensor = (draw(pipe, output_type=kind) for kind in ("pil", "np", "pt"))
    assert all(isinstance(image, Image.Image) for image in pil)
    assert array.shape == (2, 16, 16, 3)
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), (array * 255).round().astype(np.uint8))
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    images = pipe(PROMPTS, num_inference_steps=1, return_dict=False)
    assert len(images) == 1
    assert len(images[0]) == 2


def test_the_generator_decides_the_noise(pipe: SemanticRoutingPipeline) -> None:
    seeds = (1, 1, 2)
    a, b, c = (draw(pipe, latents=None, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_every_image_can_have_a_generator(pipe: SemanticRoutingPipeline) -> None:
    both = draw(exact(pipe), latents=None, generator=[torch.Generator().manual_seed(i) for i in (3, 4)])
    one = pipe(
        PROMPTS[1],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=1e-4)


def test_height_and_width_decide_the_size(pipe: SemanticRoutingPipeline) -> None:
    (image,) = pipe("a blue star", height=24, width=8, num_inference_steps=1).images
    assert image.size == (8, 24)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 18, "width": 16}, r"18 x 16 pixels does not divide into .* patches of 4 x 4 pixels"),
        ({"height": 0}, "height is 0; it must be at least 1"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"\(2, 3, 8, 8\), but these images need \(2, 3, 16, 16\)"),
        ({"negative_prompt": ["a", "b", "c"]}, "3 negative prompts for 2 prompts"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; it must be at least 1"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 2 images"),
        ({"output_type": "jpeg"}, "unknown output_type 'jpeg'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["pooled"]}, r"not \['pooled'\]"),
    ],
)
def test_bad_arguments_are_refused(pipe: SemanticRoutingPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipe, **options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("prompt", [None, 3, ["a", None]])
def test_prompts_must_be_texts(pipe: SemanticRoutingPipeline, prompt: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"prompt is {prompt!r}; expected a text or a list of texts")):
        pipe(prompt)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.behaviour(
    "diffusers",
    when="a size, a number of steps or a guidance scale is `np.int64(32)`, `32.0` or a tensor",
    then="it is used as the number 32; 32.5, True, a text or NaN is refused",
)
def test_numbers_of_any_type_are_accepted(pipe: SemanticRoutingPipeline) -> None:
    for eight in (np.int64(8), 8.0, np.float32(8), torch.tensor(8), np.array(8)):
        (image,) = pipe("a", height=eight, width=24, num_inference_steps=eight, num_images_per_prompt=1.0).images
        assert image.size == (24, 8)
    guided = draw(pipe)
    for scale in (np.float64(GUIDANCE), int(GUIDANCE), torch.tensor(GUIDANCE)):
        assert torch.equal(draw(pipe, guidance_scale=scale), guided)
    for name in ("height", "num_inference_steps", "num_images_per_prompt"):
        for value in (8.5, "8", True, [8], float("nan"), torch.ones(2)):
            with pytest.raises(ValueError, match=f"{name} is .*; expected a whole number"):
                draw(pipe, **{name: value})
    for scale in (float("nan"), float("inf"), 1e38, "3", None):
        with pytest.raises(ValueError, match=r"guidance_scale is .*; expected a number between -1000 and 1000"):
            draw(pipe, guidance_scale=scale)


@pytest.mark.behaviour(
    "diffusers",
    when="`guidance_scale` is 1 or less",
    then="the image is sampled without guidance, as in every diffusers pipeline",
)
def test_a_guidance_scale_of_one_or_less_is_no_guidance(pipe: SemanticRoutingPipeline) -> None:
    plain = draw(pipe, guidance_scale=1.0)
    for scale in (0, 0.5, -2):
        assert torch.equal(draw(pipe, guidance_scale=scale), plain)


def test_a_callback_gets_and_changes_latents(pipe: SemanticRoutingPipeline) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, float(timestep), pipe.guidance_scale, pipe.num_timesteps))
        return {"latents": torch.full_like(tensors["latents"], 7.0)} if step == STEPS - 1 else tensors

    result = draw(pipe, callback_on_step_end=callback)
    assert seen == [(i, pytest.approx(1000 * (1 - i / STEPS)), GUIDANCE, STEPS) for i in range(STEPS)]
    assert (result == 7).all()


def test_a_callback_can_stop_the_call(pipe: SemanticRoutingPipeline) -> None:
    steps = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    draw(pipe, callback_on_step_end=callback)
    assert steps == [0, 1]


@pytest.mark.behaviour(
    "diffusers",
    when="a callback changes `_guidance_scale`, `_interrupt`, latents, prompt embeddings or sigmas",
    then="the next step uses the new value",
)
def test_a_callback_turns_guidance_off_and_on(pipe: SemanticRoutingPipeline) -> None:
    def become(scale: float) -> Callable[..., Any]:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale = scale
            return tensors

        return callback

    guided, plain = draw(pipe), draw(pipe, guidance_scale=1.0)
    for scale in (1.0, 0.0, 9.0):
        assert not torch.equal(draw(pipe, callback_on_step_end=become(scale)), guided)
    assert not torch.equal(draw(pipe, guidance_scale=1.0, callback_on_step_end=become(GUIDANCE)), plain)
    assert torch.equal(draw(pipe, callback_on_step_end=become(GUIDANCE)), guided)
    cutoff = diffusers.callbacks.SDCFGCutoffCallback(cutoff_step_ratio=0.0)
    noise = noise_for(0, [(0, 0)], pipe.latent_shape())
    one = {"num_inference_steps": STEPS, "latents": noise, "output_type": "latent"}
    off = pipe("a star", guidance_scale=1.0, **one).images
    step_0 = pipe("a star", callback_on_step_end=cutoff, callback_on_step_end_tensor_inputs=[], **one).images
    assert step_0.shape == off.shape
    with pytest.raises(ValueError, match="guidance_scale is nan"):
        draw(pipe, callback_on_step_end=become(float("nan")))


def test_a_callback_replaces_prompts_and_sigmas(make_bundle: MakeBundle) -> None:
    for arm in ("depth", "joint"):
        pipe = quiet(make_pipeline(make_bundle(arm)))
        stars, null = pipe.encode_prompt(["a star"] * 2), pipe.encode_prompt("gray")

        def swap(
            pipe: Any, step: int, timestep: Any, tensors: dict[str, Any], stars: Any = stars, null: Any = null
        ) -> dict[str, Any]:
            return {"prompt_embeds": stars, "negative_prompt_embeds": null}

        def sigmas(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                pipe.scheduler.sigmas[2:-1] *= 0.5
            return tensors

        names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
        plain = draw(pipe)
        changed = draw(pipe, callback_on_step_end=swap, callback_on_step_end_tensor_inputs=names)
        assert not torch.equal(changed, plain)
        assert not torch.equal(draw(pipe, callback_on_step_end=sigmas), plain)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("back", "message"),
    [
        (None, "returned None; expected the dictionary"),
        ({"latents": torch.zeros(1)}, r"latents have the shape \(1,\)"),
        ({"prompt_embeds": torch.zeros(2)}, "prompt_embeds is a Tensor; expected what encode_prompt returns"),
        ({"latents": torch.full((2, 3, 16, 16), torch.nan)}, "the images are NaN or infinite"),
    ],
)
def test_wrong_results_of_callbacks_are_refused(pipe: SemanticRoutingPipeline, back: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(pipe, callback_on_step_end=lambda *_: back)
