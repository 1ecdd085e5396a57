"""A trained model as a pipeline of diffusers.

This is where the conventions of diffusers are met: its sigma is 1 - t, its timesteps are 1000 sigma, and its
schedulers step along noise - data, the negative of this program's velocity.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semantic_routing.codec import Codec, PixelCodec, VAECodec
from semantic_routing.config import from_dict
from semantic_routing.device import use_bfloat16
from semantic_routing.features import TextFeatures
from semantic_routing.generate import check_channels, check_encoder, latent_shape
from semantic_routing.sampler import Velocity, extrapolated, join, schedule
from semantic_routing.text_encoder import TextEncoder, TextEncoderConfig
from semantic_routing.transformer import SemanticRoutingTransformer

FLOW_MATCHING = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
"""Schedulers that always integrate a flow; others do with ``use_flow_sigmas``."""
PRECISIONS = ("auto", "bf16", "fp32")
OutputType = Literal["pil", "np", "pt", "latent"]
OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""(pipeline, step, timestep, tensors) -> tensors to go on with."""


class SemanticRoutingPipeline(DiffusionPipeline, LoraBaseMixin):
    """Text to images: a language model, the transformer that reads all its layers, a flow-matching scheduler.

    A model of pixels has no ``vae``. Components can be exchanged as in any pipeline; what does not fit together
    is a ValueError that names both sides.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer"]

    def __init__(
        self,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        transformer: SemanticRoutingTransformer,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        image_size: int = 256,
        null_prompt: str = "",
        text: dict[str, Any] | None = None,
        precision: str = "auto",
    ) -> None:
        """``image_size`` is the side of images in pixels unless a call asks for another.

        ``null_prompt`` is what the model learned as "no prompt". ``text`` holds fields of ``TextEncoderConfig``
        and ``total_layers``, the depth of the language model that ``text_encoder`` was cut from. ``precision`` is
        the type of products with float32 weights, as in training and in ``semroute sample``: "auto" is bfloat16
        where the hardware has it. Weights loaded in a narrower type always run in that type.
        """
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; use one of {', '.join(PRECISIONS)}")
        self.register_modules(
            text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler, vae=vae
        )
        self.register_to_config(image_size=image_size, null_prompt=null_prompt, text=text, precision=precision)
        self._check_components()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "B Ch h w"] | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: OnStepEnd | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of prompts, those of one prompt after another.

        ``negative_prompt`` takes the null prompt's place in guidance; a ``guidance_scale`` of 1 is none.
        ``latents`` is the starting noise, by default drawn from ``generator``; ``sampler.noise_for`` gives that of
        ``semroute sample``. ``output_type`` is "pil", "np" [B, H, W, 3] or "pt" [B, 3, H, W] with values from 0
        to 1, or "latent". Raises ValueError for what does not fit: components, scheduler, sizes.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) for text in prompts):
            raise ValueError(f"prompt is {prompt!r}; expected a text or a list of texts")
        if not prompts or num_images_per_prompt < 1:
            raise ValueError(f"nothing to draw: {len(prompts)} prompts, {num_images_per_prompt} images for each")
        if output_type not in get_args(OutputType):
            raise ValueError(f"unknown output_type {output_type!r}; use one of {', '.join(get_args(OutputType))}")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback can have {self._callback_tensor_inputs}, but not {sorted(unknown)}")
        codec = self._check_components()
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self._execution_device
        shape = (len(prompts) * num_images_per_prompt, *self.latent_shape(height, width))
        if isinstance(generator, list) and len(generator) not in (1, shape[0]):
            raise ValueError(f"{len(generator)} generators for {shape[0]} images; give one, or one for each")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}, but these images need {shape}")
        x = latents.to(device, torch.float32)
        velocity = self._velocity(prompts, negative_prompt, num_images_per_prompt, guidance_scale, device)
        times = self._set_times(num_inference_steps, device)
        accepts_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} if accepts_generator else {}
        with self.progress_bar(total=self._num_timesteps) as bar:
            for i, timestep in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                v = velocity(x, times[i, None].to(device))
                x = self.scheduler.step(-v, timestep, x, return_dict=False, **options)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": x} if "latents" in callback_on_step_end_tensor_inputs else {}
                    x = callback_on_step_end(self, i, timestep, tensors).pop("latents", x)
                bar.update()
        images = x if output_type == "latent" else _as(output_type, codec, x)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def guidance_scale(self) -> float:
        """Scale of guidance of the call in progress, for callbacks."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Evaluations of the velocity in the call in progress, for callbacks."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback asked to stop, by setting ``_interrupt``."""
        return self._interrupt

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape (channels, h, w) of the latents of an image in pixels; ValueError where patches do not divide it."""
        height, width = (self.config.image_size if side is None else side for side in (height, width))
        return latent_shape(self.codec(), self.transformer.backbone.cfg, height, width)

    def encode_prompt(self, prompts: Sequence[str]) -> TextFeatures:
        """What the text encoder says about the prompts, where and as the transformer's products need it."""
        features = self.encoder().encode(prompts, with_kv=self.transformer.config.arm == "fusedit")
        device = self._execution_device
        return features.to(device, torch.float32 if self._product_type(device) == torch.float32 else None)

    def enable_vae_tiling(self) -> None:
        """Decode large images in overlapping tiles: less memory, other pixels. ValueError for a model of pixels."""
        self._vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decode images whole again."""
        self._vae().disable_tiling()

    def save_lora_weights(self, save_directory: Path | str, adapter_name: str = "default") -> None:
        """Write the transformer's LoRA adapter as ``pytorch_lora_weights.safetensors``."""
        from peft.utils import get_peft_model_state_dict

        layers = get_peft_model_state_dict(self.transformer, adapter_name=adapter_name)
        config = self.transformer.peft_config[adapter_name].to_dict()
        metadata = {key: sorted(x) if isinstance(x, set) else x for key, x in config.items()}  # JSON lacks sets
        self._save_lora_weights(str(save_directory), {"transformer": layers}, {"transformer": metadata})

    def load_lora_weights(self, source: Path | str | dict[str, Tensor], adapter_name: str | None = None) -> None:
        """Add to the transformer a LoRA adapter that ``save_lora_weights`` wrote."""
        self.transformer.load_lora_adapter(
            source if isinstance(source, dict) else str(source),
            prefix="transformer",
            adapter_name=adapter_name,
            use_safetensors=True,
            _pipeline=self,  # so that offloaded components are put back
        )

    def _velocity(
        self,
        prompts: list[str],
        negative: str | list[str] | None,
        images: int,
        scale: float,
        device: torch.device,
    ) -> Velocity:
        """The guided velocity for ``images`` of each prompt; text is read once, prepared once where time allows."""
        features = _repeated(self.encode_prompt(prompts), images)
        if scale != 1:
            negative = self.config.null_prompt if negative is None else negative
            nulls = [negative] if isinstance(negative, str) else negative
            if len(nulls) not in (1, len(prompts)):
                raise ValueError(f"{len(nulls)} negative prompts for {len(prompts)} prompts; give one, or one for each")
            null = self.encode_prompt(nulls)
            features = join(features, null if len(nulls) == 1 else _repeated(null, images))
        with self._products(device):
            once = None if self.transformer.depends_on_time else self.transformer.prepare_text(features)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            with self._products(device):
                context = once
                if context is None:
                    context = self.transformer.prepare_text(features, self.transformer.gate_time(x, t))
                return self.transformer(x, t, context).float()

        return velocity if scale == 1 else extrapolated(velocity, scale)

    def _set_times(self, steps: int, device: torch.device) -> Float[Tensor, " T"]:
        """Prepare the scheduler for ``steps`` steps; the time t of each of its timesteps.

        Where it takes sigmas it is given this program's schedule, which it may shift. Times are 1 - sigma: some
        schedulers round their timesteps to integers.
        """
        _check_scheduler(self.scheduler)
        if "sigmas" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(sigmas=(1 - schedule(steps)[:-1]).numpy(), device=device)
        else:
            self.scheduler.set_timesteps(steps, device=device)
        self.scheduler.set_begin_index(0)
        self._num_timesteps = len(self.scheduler.timesteps)
        sigmas = self.scheduler.sigmas.float().cpu()
        if len(sigmas) != self._num_timesteps + 1 or sigmas[0] > 1 or (sigmas.diff() > 0).any():
            raise ValueError(
                f"{type(self.scheduler).__name__} goes through sigmas from {sigmas[0]:g} to {sigmas[-1]:g}, but flow "
                "matching needs them to fall from at most 1: leave out its other options for sigmas"
            )
        return 1 - sigmas[:-1]

    def _product_type(self, device: torch.device) -> torch.dtype:
        """The type of matrix products: that of narrow weights, or what ``precision`` says of float32 ones."""
        dtype = self.transformer.dtype
        wide = dtype == torch.float32
        return torch.bfloat16 if wide and use_bfloat16(self.config.precision, device) else dtype

    def _products(self, device: torch.device) -> AbstractContextManager[None]:
        """A context in which products have their type."""
        dtype = self._product_type(device)
        return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

    def encoder(self) -> TextEncoder:
        """The text encoder as training used it."""
        settings = dict(self.config.text or {})
        total = settings.pop("total_layers", 0)
        settings.setdefault("name_or_path", self.text_encoder.name_or_path or "the text encoder")
        config = from_dict(TextEncoderConfig, settings, "text.")
        return TextEncoder.from_model(self.text_encoder, self.tokenizer, config, total)

    def codec(self) -> Codec:
        return PixelCodec() if self.vae is None else VAECodec(self.vae)

    def _vae(self) -> Any:
        if self.vae is None:
            raise ValueError("this model draws pixels and has no VAE to tile")
        return self.vae

    def _check_components(self) -> Codec:
        """Raise where two components were not made for each other; the codec."""
        codec = self.codec()
        check_encoder(self.encoder().shape, self.transformer.backbone.cfg)
        check_channels(codec, self.transformer.backbone.cfg)
        return codec


def _check_scheduler(scheduler: Any) -> None:
    """Raise unless the scheduler integrates a flow from sigma 1 to 0."""
    name, config = type(scheduler).__name__, scheduler.config
    prediction, flow_sigmas = config.get("prediction_type", "flow_prediction"), config.get("use_flow_sigmas", False)
    if not (isinstance(scheduler, FLOW_MATCHING) or flow_sigmas) or prediction != "flow_prediction":
        raise ValueError(
            f"this transformer predicts a flow's velocity, but {name} with prediction_type={prediction!r} and "
            f"use_flow_sigmas={flow_sigmas} is not flow matching: use FlowMatchEulerDiscreteScheduler, or a scheduler "
            "made with use_flow_sigmas=True and prediction_type='flow_prediction'"
        )
    for option in ("use_dynamic_shifting", "invert_sigmas"):
        if config.get(option):
            raise ValueError(f"{name} has {option}=True, which this transformer was not trained for; make it False")


def _as(output_type: str, codec: Codec, latents: Tensor) -> Any:
    """The images of latents as PIL images, an array or a tensor."""
    pixels = codec.decode(latents).cpu()
    if output_type == "pt":
        return pixels.permute(0, 3, 1, 2).float() / 255
    if output_type == "np":
        return pixels.numpy().astype(np.float32) / 255
    return [Image.fromarray(image) for image in pixels.numpy()]


def _repeated(features: TextFeatures, times: int) -> TextFeatures:
    """The features of every prompt ``times`` times in a row."""

    def repeat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(times, dim=1)

    hidden, mask = features.hidden.repeat_interleave(times, dim=1), features.mask.repeat_interleave(times, dim=0)
    return TextFeatures(hidden, mask, repeat(features.keys), repeat(features.values))
