"""Sana, PRX and Z-Image as subjects: how each encodes text, defines time and what it predicts."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.training.codecs import codec_of
from semantic_routing.adopt.training.config import KeepConfig
from semantic_routing.adopt.training.keep_texts import MEASURED, decide
from semantic_routing.adopt.training.subject import Captions, Subject
from semantic_routing.common.sizes import parse_bytes
from semantic_routing.model.codec import ELSEWHERE, ON_CPU, NotFiniteError
from semantic_routing.sampling.samplers import generator_for, noise_for
from semantic_routing.text.architecture import find_layers
from semantic_routing.text.config import TextShape
from semantic_routing.text.identity import encoder_identity
from semantic_routing.text.store import DiskStates, States, StateStore, state_key

Text = Float[Tensor, "_ W"]
"""The tokens of one caption without padding; channels hold the original state and the layers."""


class DiffusersSubject(Subject):
    """A pipeline of diffusers."""

    call: dict[str, Any] = {}  # noqa: RUF012
    """Arguments of the pipeline's call besides prompt, size and settings."""

    def __init__(self, pipe: Any, device: torch.device, keep: KeepConfig) -> None:
        self.pipe, self.device, self._keep = pipe, device, keep
        self.transformer = pipe.transformer
        self.codec = codec_of(pipe)
        self.checkpoints = bool(getattr(self.transformer, "_supports_gradient_checkpointing", False))
        self._store = StateStore(0)

    def keep(self, count: int | None, captions: Sequence[str]) -> str:
        texts = self.texts(captions[:MEASURED])
        chosen, words = decide(self._keep, count, sum(x.nbytes for x in texts) / max(1, len(texts)))
        disk = None
        if chosen.keep_on_disk:
            folder = Path(chosen.keep_on_disk).expanduser() / self._identity()
            disk = DiskStates(folder, parse_bytes(chosen.keep_on_disk_bytes))
        self._store = StateStore(parse_bytes(chosen.keep), disk)
        return words

    def _identity(self) -> str:
        """Return a digest of everything that determines an encoded text, except the caption."""
        pipe = self.pipe
        layers = len(find_layers(pipe.text_encoder)[0])
        shape = TextShape(layers=tuple(range(1, layers + 1)), total_layers=layers, width=0, kv_heads=0, head_dim=0)
        return state_key(
            encoder_identity(pipe.text_encoder, shape), type(pipe).__name__, repr(pipe.tokenizer), version("diffusers")
        )

    def texts(self, captions: Captions) -> list[Text]:
        """Return each caption's encoded text, independent of the others, because all forward passes have one shape."""
        found: dict[str | None, Tensor] = {}
        for caption in dict.fromkeys(captions):
            kept = self._store.get(_key(caption))
            if kept is not None:
                found[caption] = kept.hidden[0].to(self.device)
        size = ON_CPU if self.device.type == "cpu" else ELSEWHERE
        missing = [caption for caption in dict.fromkeys(captions) if caption not in found]
        for group in ([c for c in missing if c is not None], [c for c in missing if c is None]):
            for start in range(0, len(group), size):
                part = group[start : start + size]
                read = self._read([c or "" for c in part + part[-1:] * (size - len(part))], null=part[0] is None)
                for caption, text in zip(part, read, strict=False):
                    self._store.put(_key(caption), States(text[None]))
                    found[caption] = text
        return [found[caption] for caption in captions]

    @abstractmethod
    def _read(self, prompts: list[str], null: bool) -> list[Text]:
        """Encode prompts as the pipeline does; ``null`` if they stand for no prompt."""

    def shift(self, height: int, width: int) -> float:
        _, h, w = self.latent_shape(height, width)
        return scheduler_shift(self.pipe.scheduler.config, (h // self.patch) * (w // self.patch))

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[str], images: Sequence[tuple[int, int]], cfg: Drawing
    ) -> UInt8[Tensor, "B H W 3"]:
        if cfg.sampler is not None or cfg.shift is not None:
            name = type(self.pipe).__name__
            raise ValueError(
                f"sampler and shift are only for this program's own pipelines; {name} has a scheduler: leave them out"
            )
        drawn = [self._draw(prompt, image, cfg) for prompt, image in zip(prompts, images, strict=True)]
        if bad := [i for i, image in enumerate(drawn) if not np.isfinite(image).all()]:
            raise NotFiniteError(bad, f"the picture of {prompts[bad[0]]!r} is not finite: try --precision fp32")
        return torch.from_numpy((np.stack(drawn) * 255).round().astype(np.uint8))

    def _draw(self, prompt: str, image: tuple[int, int], cfg: Drawing) -> np.ndarray:
        """Sample one image, with values from 0 to 1."""
        height, width = self.pixels
        noise = noise_for(cfg.seed, [image], self.latent_shape(height, width)).to(self.device, self._noise_type)
        given = {
            "num_inference_steps": cfg.steps,
            "guidance_scale": cfg.guidance,
            "negative_prompt": self.negative_prompt,
        }
        options = {name: value for name, value in given.items() if value is not None}
        found = self.pipe(
            prompt=prompt, height=height, width=width, latents=noise, output_type="np",
            generator=generator_for(cfg.seed, *image, step=0), **self.call, **options,
        )  # fmt: skip
        return found.images[0]

    @property
    def _noise_type(self) -> torch.dtype:
        """Type in which the pipeline expects its noise."""
        return torch.float32


class SanaSubject(DiffusersSubject):
    """Sana: timesteps are 1000 sigma, and the transformer predicts noise minus data."""

    call = {"use_resolution_binning": False}  # noqa: RUF012

    def __init__(self, pipe: Any, device: torch.device, keep: KeepConfig) -> None:
        super().__init__(pipe, device, keep)
        config = self.transformer.config
        self.patch, self.image_size = config.patch_size, config.sample_size * self.codec.factor
        # Prompts come behind an instruction, which the pipeline's call holds; the negative prompt does not.
        self._instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default

    def _read(self, prompts: list[str], null: bool) -> list[Text]:
        embeds, mask, *_ = self.pipe.encode_prompt(
            prompts, False, complex_human_instruction=None if null else self._instruction
        )
        return real_tokens(embeds, mask)

    def velocity(self, noisy: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], texts: Any) -> Float[Tensor, "B C h w"]:
        embeds, mask = padded(texts)
        dtype, config = self.transformer.dtype, self.transformer.config
        out = self.transformer(
            noisy.to(dtype), encoder_hidden_states=embeds.to(dtype), encoder_attention_mask=mask.long(),
            timestep=1000 * (1 - t) * config.timestep_scale, return_dict=False,
        )[0]  # fmt: skip
        return -out[:, : noisy.shape[1]].float()  # the second half of the channels, if there is one, is a learned sigma


class PRXSubject(DiffusersSubject):
    """PRX: the time is sigma, and the transformer predicts noise minus data."""

    call = {"use_resolution_binning": False}  # noqa: RUF012

    def __init__(self, pipe: Any, device: torch.device, keep: KeepConfig) -> None:
        super().__init__(pipe, device, keep)
        self.patch, self.image_size = self.transformer.config.patch_size, pipe.get_default_resolution()

    def _read(self, prompts: list[str], null: bool) -> list[Text]:
        try:
            embeds, mask, *_ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        except NameError as error:  # diffusers 0.42 uses ftfy without asking for it
            raise ValueError(
                f'PRX pipelines clean prompts with a package that is missing ({error}): pip install "ftfy"'
            ) from error
        return real_tokens(embeds, mask)

    def velocity(self, noisy: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], texts: Any) -> Float[Tensor, "B C h w"]:
        embeds, mask = padded(texts)
        dtype = self.transformer.dtype
        out = self.transformer(
            hidden_states=noisy.to(dtype), timestep=1 - t, encoder_hidden_states=embeds.to(dtype), attention_mask=mask,
            return_dict=False,
        )[0]  # fmt: skip
        return -out.float()

    @property
    def _noise_type(self) -> torch.dtype:
        return self.transformer.dtype


class ZImageSubject(DiffusersSubject):
    """Z-Image: the time is this program's, 0 noise and 1 data, and the transformer predicts data minus noise."""

    def __init__(self, pipe: Any, device: torch.device, keep: KeepConfig) -> None:
        super().__init__(pipe, device, keep)
        self.patch = self.transformer.config.all_patch_size[0]
        self.image_size = 128 * self.codec.factor  # the default of the pipeline's call: 1024 for a factor of 8

    def _read(self, prompts: list[str], null: bool) -> list[Text]:
        return list(self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0])

    def velocity(self, noisy: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], texts: Any) -> Float[Tensor, "B C h w"]:
        dtype = self.transformer.dtype
        out = self.transformer(
            list(noisy.to(dtype)[:, :, None].unbind()), t, [text.to(dtype) for text in texts], return_dict=False
        )[0]
        return torch.stack([image.float() for image in out]).squeeze(2)


SUBJECTS: dict[str, type[DiffusersSubject]] = {"sana": SanaSubject, "prx": PRXSubject, "z-image": ZImageSubject}
"""Families of diffusers that can be trained and sampled from the command line."""


def real_tokens(embeds: Float[Tensor, "B N W"], mask: Tensor) -> list[Text]:
    """Return each text's tokens without padding; for an empty text the first position."""
    real = mask.bool().clone()
    real[~real.any(1), 0] = True
    return [text[own].contiguous() for text, own in zip(embeds, real, strict=True)]


def padded(texts: Sequence[Text]) -> tuple[Float[Tensor, "B N W"], Bool[Tensor, "B N"]]:
    """Return texts as one batch, padded with zeros on the right, and the mask of real tokens.

    The families that use it give text no positions, so the side of the padding does not matter.
    """
    embeds = pad_sequence(list(texts), batch_first=True)
    lengths = torch.tensor([len(text) for text in texts], device=embeds.device)
    return embeds, torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]


def scheduler_shift(config: Any, tokens: int) -> float:
    """Return the shift a of a scheduler, which maps a noise level s to a s / (1 + (a - 1) s).

    In some schedulers the shift depends on an image's number of tokens.
    """
    if config.get("use_dynamic_shifting"):
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = base + (most - base) * (tokens - low) / (high - low)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
    if "flow_shift" in config:
        return float(config["flow_shift"]) if config.get("use_flow_sigmas") else 1.0
    return float(config.get("shift", 1.0))


def _key(caption: str | None) -> str:
    return state_key(caption)
