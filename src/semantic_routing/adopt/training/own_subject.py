"""Pipelines of this program as subjects, and an adopted one as ``TextToImage`` for samplers and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.file import find_file
from semantic_routing.adopt.training.config import KeepConfig
from semantic_routing.adopt.training.keep_texts import decide
from semantic_routing.adopt.training.open_pipeline import load_results, open_pipe
from semantic_routing.adopt.training.subject import Captions, Subject
from semantic_routing.common.device import pick_device, use_bfloat16
from semantic_routing.model.runtime import autocast
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.text.encoder import TextEncoder
from semantic_routing.text.features import TextFeatures


class OwnSubject(Subject):
    """A pipeline of this program."""

    def __init__(self, pipe: Any, device: torch.device, precision: str, keep: KeepConfig) -> None:
        self.pipe, self.device, self._keep = pipe, device, keep
        self.bundle = as_bundle(pipe, device, precision)
        self.codec, self.image_size = self.bundle.codec, self.bundle.image_size
        self.patch = self.bundle.model.cfg.patch

    def blocks(self) -> list[nn.Module]:
        return list(self.bundle.model.blocks)

    def keep(self, count: int | None, captions: Sequence[str]) -> str:
        encoder = self.bundle.encoder
        chosen, words = decide(self._keep, count, encoder.state_bytes(captions) if captions else 0)
        settings = replace(
            encoder.config,
            keep=chosen.keep,
            keep_on_disk=chosen.keep_on_disk,
            keep_on_disk_bytes=chosen.keep_on_disk_bytes,
        )
        keeping = TextEncoder(encoder.model, encoder.tokenizer, settings, encoder.shape)
        self.bundle = replace(self.bundle, encoder=keeping)
        return words

    def texts(self, captions: Captions) -> TextFeatures:
        null = self.bundle.null_prompt
        return self.bundle.encode([null if caption is None else caption for caption in captions], strict=False)

    def velocity(self, noisy: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], texts: Any) -> Float[Tensor, "B C h w"]:
        model = self.bundle.model
        with autocast(self.device, self.bundle.bf16):
            context = model.prepare_text(texts, model.gate_time(noisy, t).detach())
            return model(noisy, t, context)

    def shift(self, height: int, width: int) -> float:
        return float(self.pipe.scheduler.config.get("shift", 1.0))

    def sample(
        self, prompts: Sequence[str], images: Sequence[tuple[int, int]], cfg: Drawing
    ) -> UInt8[Tensor, "B H W 3"]:
        given = {name: getattr(cfg, name) for name in ("steps", "guidance", "sampler", "shift")}
        settings = SampleConfig(**{name: value for name, value in given.items() if value is not None}, seed=cfg.seed)
        bundle = replace(self.bundle, size=self.pixels)
        if self.negative_prompt is not None:
            bundle = replace(bundle, null_prompt=self.negative_prompt)
        return bundle.sample(prompts, images, settings)


def as_bundle(pipe: Any, device: torch.device, precision: str = "auto") -> TextToImage:
    """Return a pipeline of this program as ``TextToImage``, with its routing, if it was adopted."""
    chosen = pipe.config.precision if precision == "auto" else precision
    return TextToImage(
        model=pipe.transformer.backbone,
        encoder=pipe.encoder(),
        codec=pipe.check_components(),
        image_size=pipe.config.image_size,
        null_prompt=pipe.config.null_prompt,
        bf16=use_bfloat16(chosen, device),
    )


def open_adopted(
    pipeline: str | Path, routing: str | Path, device: str = "auto", *, scale: float = 1.0, lora: bool = True
) -> TextToImage:
    """Load a pipeline of this program with the results of ``semroute adopt train``, to sample or score it.

    A LoRA in the folder of the routing is loaded, too, unless ``lora`` is False. Raises ValueError for other pipelines
    and for a routing of another model.
    """
    where = pick_device(device)
    pipe = open_pipe(str(pipeline), where)
    if not hasattr(pipe.transformer, "backbone"):
        raise ValueError(f"{pipeline} is a {type(pipe).__name__}, not a pipeline of semroute export")
    load_results(pipe, find_file(routing), scale, lora=lora)
    return as_bundle(pipe, where)
