"""A trained model as a diffusers pipeline.

It converts between conventions: sigma of diffusers is 1 - t, its timesteps are 1000 sigma, and its schedulers integrate
noise - data, the negative of this program's velocity.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from diffusers import AutoencoderKL, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semantic_routing.interop.components import Components
from semantic_routing.interop.conditioning import Conditioning, check_embeds, repeated
from semantic_routing.interop.facts import latents_of, resolve
from semantic_routing.interop.flow_schedulers import Numbers, asked_sigmas, set_times, time_of
from semantic_routing.interop.lora import TransformerLora, lora_scaled
from semantic_routing.interop.numerals import Number, finite, whole
from semantic_routing.interop.transformer import SemanticRoutingTransformer
from semantic_routing.model.codec import Codec, NotFiniteError, check_pictures
from semantic_routing.sampling.text_to_image import MOST_GUIDANCE
from semantic_routing.text.features import TextFeatures

OutputType = Literal["pil", "np", "pt", "latent"]
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""(pipeline, step, timestep, tensors) -> the tensors for the next step."""


class SemanticRoutingPipeline(Components, TransformerLora):
    """Text to image with a language model, the transformer that reads all its layers, and a flow-matching scheduler.

        pipe = SemanticRoutingPipeline.from_pretrained("pipelines/depth")  # written by semroute export
        image = pipe("a red circle", num_inference_steps=20, guidance_scale=3.0).images[0]

    A pixel model has no ``vae``. A pipeline without ``text_encoder`` and ``tokenizer`` samples from the result of
    another pipeline's ``encode_prompt``; a pipeline without ``transformer`` can only encode prompts. Components can be
    exchanged as in any pipeline; a mismatch is a ValueError that names both sides.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _guidance_scale: Number = 6.0
    _interrupt = False
    _num_timesteps = 0

    def __init__(
        self,
        text_encoder: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        transformer: SemanticRoutingTransformer | None,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        image_size: int | None = None,
        null_prompt: str | None = None,
        text: dict[str, Any] | None = None,
        precision: str | None = None,
    ) -> None:
        """Combine components; settings that are None are read from the transformer's configuration.

        ``image_size`` is the default side of images in pixels, and ``null_prompt`` the prompt that replaced dropped
        prompts in training. ``text`` holds fields of ``TextEncoderConfig``, ``total_layers`` (the depth of the language
        model before ``text_encoder`` was cut from it), and for fusedit ``keys_and_values=True``. ``precision`` is the
        dtype of matrix products with float32 weights, as in training: "auto" is bfloat16 if the hardware supports it.
        Narrower weights run in their own dtype.
        """
        super().__init__()
        facts = resolve(transformer, image_size=image_size, null_prompt=null_prompt, text=text, precision=precision)
        self.register_modules(
            text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler, vae=vae
        )
        self.register_to_config(**facts)
        if transformer is not None:
            codec = self.check_components()
            transformer.register_to_config(facts=facts | {"codec": latents_of(codec)})

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, negative_prompt: str | list[str] | None = None,
        height: Number | None = None, width: Number | None = None, num_inference_steps: Number = 50,
        guidance_scale: Number = 6.0, num_images_per_prompt: Number = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B Ch h w"] | None = None, output_type: OutputType = "pil", return_dict: bool = True,
        callback_on_step_end: OnStepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",), *,
        prompt_embeds: TextFeatures | None = None, negative_prompt_embeds: TextFeatures | None = None,
        sigmas: Numbers | None = None, timesteps: Numbers | None = None,
        attention_kwargs: dict[str, Any] | None = None, joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Sample images of prompts; the images of one prompt are neighbours.

        ``negative_prompt`` replaces the null prompt. Guidance is off at a ``guidance_scale`` of 1 or less.
        ``prompt_embeds`` and ``negative_prompt_embeds`` are results of ``encode_prompt``. ``latents`` is the starting
        noise (``noise_for`` returns that of ``semroute sample``); without it ``generator`` draws it. ``sigmas``, or
        ``timesteps`` (1000 sigma), replace ``num_inference_steps`` equal steps. ``attention_kwargs`` may be
        {"scale": 0.5} for a LoRA. ``output_type`` is "pil", "np" [B, H, W, 3] or "pt" [B, 3, H, W] from 0 to 1, or
        "latent". Callbacks may change ``_guidance_scale``, ``_interrupt``, the scheduler's sigmas and their tensors.
        Raises ValueError for arguments, components or a scheduler that do not fit.
        """
        codec = self.check_components()
        self._guidance_scale, self._interrupt = guidance_scale, False
        inputs = self._check_call(output_type, callback_on_step_end, callback_on_step_end_tensor_inputs)
        images = whole("num_images_per_prompt", num_images_per_prompt)
        asked = asked_sigmas(num_inference_steps, sigmas, timesteps)
        lora = _lora_scale(attention_kwargs, joint_attention_kwargs)
        texts = (prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        shape = (self.check_inputs(*texts) * images, *self.latent_shape(height, width))
        x = self._start(shape, generator, latents)
        set_times(self.scheduler, asked, x.device)
        with lora_scaled(self.transformer, lora):
            x = self._integrate(x, self._conditioning(*texts, images), generator, callback_on_step_end, inputs)
        result = self._decode(codec, x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def _check_call(self, output_type: str, callback: Any, inputs: Sequence[str]) -> Sequence[str]:
        """Return the names of the tensors that a callback gets; raise ValueError for options that do not exist."""
        self._scale()  # checked before the text is read
        if output_type not in get_args(OutputType):
            raise ValueError(f"unknown output_type {output_type!r}; use one of {', '.join(get_args(OutputType))}")
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            inputs = callback.tensor_inputs
        if unknown := set(inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback can have {self._callback_tensor_inputs}, but not {sorted(unknown)}")
        return inputs

    def check_inputs(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: TextFeatures | None = None,
        negative_prompt_embeds: TextFeatures | None = None,
    ) -> int:
        """Return the number of prompts; raise ValueError for prompts or embeddings that a call cannot take."""
        if prompt is not None and prompt_embeds is not None:
            raise ValueError("give either prompt or prompt_embeds, not both")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
        cfg = self.transformer.backbone.cfg
        if prompt_embeds is None:
            count = len(self._texts("prompt", prompt))
        else:
            count = len(getattr(prompt_embeds, "mask", ()))
            check_embeds("prompt_embeds", prompt_embeds, cfg, (max(count, 1),))
        if negative_prompt_embeds is not None:
            check_embeds("negative_prompt_embeds", negative_prompt_embeds, cfg, (1, count))
        elif negative_prompt is not None:
            negatives = len(self._texts("negative_prompt", negative_prompt))
            if negatives not in (1, count):
                raise ValueError(f"{negatives} negative prompts for {count} prompts; give one, or one for each")
        elif self.do_classifier_free_guidance and self.text_encoder is None:
            raise ValueError(
                "this pipeline has no text encoder to encode the null prompt: give negative_prompt_embeds, the result "
                f"of encode_prompt({self.config.null_prompt!r}), or guidance_scale=1"
            )
        return count

    def _texts(self, name: str, texts: Any) -> list[str]:
        """Return the texts of an argument as a list; raise ValueError unless they are texts that can be encoded."""
        listed = [texts] if isinstance(texts, str) else texts
        if not isinstance(listed, list | tuple) or not all(isinstance(text, str) for text in listed):
            raise ValueError(f"{name} is {texts!r}; expected a text or a list of texts")
        if not listed:
            raise ValueError(f"{name} is an empty list; give at least one text")
        self.encoder()  # raises if there is none
        return list(listed)

    def _start(self, shape: tuple[int, ...], generator: Any, latents: Any) -> Float[Tensor, "B Ch h w"]:
        """Return the starting noise: the given latents, or random ones."""
        device = self._execution_device
        if isinstance(generator, list) and len(generator) not in (1, shape[0]):
            raise ValueError(f"{len(generator)} generators for {shape[0]} images; give one, or one for each")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return _checked_latents(latents, shape).to(device, torch.float32)

    def _conditioning(self, prompt: Any, negative: Any, embeds: Any, negative_embeds: Any, images: int) -> Conditioning:
        """Encode prompts and null prompts, with ``images`` rows for each."""
        device = self._execution_device

        def read(texts: Any, known: TextFeatures | None) -> TextFeatures:
            return self.encode_prompt(texts) if known is None else self.as_products_need(known)

        def read_null() -> TextFeatures:
            null = read(self.config.null_prompt if negative is None else negative, negative_embeds)
            return null if len(null.mask) == 1 else repeated(null, images)

        features = repeated(read(prompt, embeds), images)
        conditioning = Conditioning(self.transformer, features, read_null, lambda: self.products(device))
        if self.do_classifier_free_guidance:
            conditioning.null  # noqa: B018  (read now, before the language model is offloaded)
        return conditioning

    def _integrate(
        self, x: Tensor, conditioning: Conditioning, generator: Any, callback: Any, inputs: Sequence[str]
    ) -> Tensor:
        """Integrate the velocity from noise to latents; read at every step all that a callback may change."""
        self._num_timesteps = len(self.scheduler.timesteps)
        scheduler, i = self.scheduler, 0
        options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        with self.progress_bar(total=self._num_timesteps) as bar:
            while i < len(scheduler.timesteps) and not self.interrupt:
                timestep = scheduler.timesteps[i]
                v = conditioning.velocity(x, time_of(scheduler, i, x.device), self._scale())
                x = scheduler.step(-v, timestep, x, return_dict=False, **options)[0]
                if callback is not None:
                    x = self._call_back(callback, inputs, i, timestep, x, conditioning)
                if self.scheduler is not scheduler:
                    raise ValueError("a callback replaced the scheduler; replace it before or after the call")
                bar.update()
                i += 1
        return x

    def _call_back(
        self, callback: Any, inputs: Sequence[str], step: int, timestep: Any, x: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """Call a callback with the tensors that it asked for; apply its changes and return the latents."""
        cfg, rows = self.transformer.backbone.cfg, len(x)
        tensors = {"latents": x, "prompt_embeds": conditioning.prompt}
        if "negative_prompt_embeds" in inputs:
            tensors["negative_prompt_embeds"] = conditioning.null
        back = callback(self, step, timestep, {name: tensors[name] for name in inputs})
        if not isinstance(back, dict):
            raise ValueError(f"callback_on_step_end returned {back!r}; expected the dictionary of tensors that it got")
        prompt, null = back.get("prompt_embeds", conditioning.prompt), back.get("negative_prompt_embeds")
        if prompt is not conditioning.prompt:
            prompt = check_embeds("a callback's prompt_embeds", prompt, cfg, (rows,))
            conditioning.prompt = self.as_products_need(prompt)
        if null is not None and null is not tensors.get("negative_prompt_embeds"):
            null = check_embeds("a callback's negative_prompt_embeds", null, cfg, (1, rows))
            conditioning.null = self.as_products_need(null)
        return _checked_latents(back.get("latents", x), tuple(x.shape)).to(x.device, torch.float32)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current call, for callbacks."""
        return self._scale()

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current call is guided: its scale is above 1."""
        return self._scale() > 1

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the current call, for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set ``_interrupt`` to stop the current call."""
        return self._interrupt

    def _scale(self) -> float:
        return finite("guidance_scale", self._guidance_scale, at_most=MOST_GUIDANCE)

    def _decode(self, codec: Codec, x: Tensor, output_type: str) -> Any:
        """Convert the final latents to the output type; raise NotFiniteError if an image is NaN or infinite."""
        try:
            check_pictures(x)
            return x if output_type == "latent" else _as(output_type, codec, x)
        except NotFiniteError as error:
            raise NotFiniteError(
                error.pictures,
                "the images are NaN or infinite: the weights (or a LoRA's or the VAE's) are damaged, or too "
                f"large for {self.product_type(x.device)}; check the weights, or load them with dtype=torch.float32",
            ) from error


def _as(output_type: str, codec: Codec, latents: Tensor) -> Any:
    """Decode latents to PIL images, an array or a tensor."""
    pixels = codec.decode(latents).cpu()
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).float() / 255
    if output_type == "np":
        return pixels.numpy().astype(np.float32) / 255
    return [Image.fromarray(image) for image in pixels.numpy()]


def _checked_latents(latents: Any, shape: tuple[int, ...]) -> Tensor:
    """Return the latents; raise ValueError unless they are a floating-point tensor of this shape."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        raise ValueError(f"latents are a {type(latents).__name__}; expected a tensor of floating-point numbers")
    if latents.shape != shape:
        raise ValueError(f"latents have the shape {tuple(latents.shape)}, but these images need {shape}")
    return latents


def _lora_scale(*given: dict[str, Any] | None) -> float:
    """Return the LoRA scale in ``attention_kwargs``, under either of its names; 1 by default."""
    options = {name: value for kwargs in given if kwargs is not None for name, value in kwargs.items()}
    if unknown := sorted(set(options) - {"scale"}):
        raise ValueError(f"attention_kwargs hold {unknown}, but this transformer only takes the scale of a LoRA")
    return finite("the scale of attention_kwargs", options.get("scale", 1.0), at_most=MOST_GUIDANCE)


# Pipelines that version 0.1 exported name this module, and diffusers only finds components in imported modules.
import_module("semantic_routing.transformer")
