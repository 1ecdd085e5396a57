"""Subject: an adopted pipeline with this program's conventions for images, texts, times and velocities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor, nn

from semantic_routing.adopt.drawing import Drawing
from semantic_routing.adopt.families import find_family
from semantic_routing.adopt.families.family import module_at
from semantic_routing.data.batch import collate
from semantic_routing.data.streams import Row
from semantic_routing.flow import path, velocity
from semantic_routing.model.codec import Codec
from semantic_routing.training.latents import batch_latents

Captions = Sequence[str | None]
"""Captions; None stands for no prompt."""


class Subject(ABC):
    """A pipeline that can be trained and sampled; only its class knows the pipeline's own conventions."""

    pipe: Any
    codec: Codec
    device: torch.device
    image_size: int
    """Side of an image in pixels."""
    size: tuple[int, int] | None = None
    """Height and width of sampled images, if they are not both ``image_size``."""
    negative_prompt: str | None = None
    """Prompt that classifier-free guidance moves away from, if it is not the pipeline's own."""
    patch: int
    """Side of a patch in latent positions."""
    checkpoints: bool = False
    """Whether its blocks can be recomputed in the backward pass."""

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of sampled images."""
        return self.size or (self.image_size, self.image_size)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the transformer."""
        transformer = self.pipe.transformer
        parts = find_family(transformer).blocks
        return [block for part in parts for block in module_at(transformer, part.path)]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of an image's latents; raise ValueError if patches do not divide the image."""
        side = self.codec.factor * self.patch
        if height < 1 or width < 1 or height % side or width % side:
            raise ValueError(
                f"an image of {height} x {width} pixels does not divide into this pipeline's patches of {side} x "
                f"{side} pixels; use multiples of {side}"
            )
        return self.codec.latent_shape(height, width)

    @abstractmethod
    def texts(self, captions: Captions) -> Any:
        """Encode captions as the pipeline does, with the layers that the routing needs."""

    @abstractmethod
    def keep(self, count: int | None, captions: Sequence[str]) -> str:
        """Cache the texts of ``count`` captions (None: unlimited) if they fit; return a sentence with place and size.

        ``captions`` are some of them, whose sizes are measured.
        """

    @abstractmethod
    def velocity(self, noisy: Float[Tensor, "B C h w"], t: Float[Tensor, " B"], texts: Any) -> Float[Tensor, "B C h w"]:
        """Predict data minus noise at the times ``t`` (0 noise, 1 data)."""

    @abstractmethod
    def shift(self, height: int, width: int) -> float:
        """Return the scheduler's shift of the times towards the noise, for images of this size."""

    @abstractmethod
    def sample(
        self, prompts: Sequence[str], images: Sequence[tuple[int, int]], cfg: Drawing
    ) -> UInt8[Tensor, "B H W 3"]:
        """Sample one image for each prompt; ``images`` holds (prompt index, image index), which determine the noise."""


@torch.no_grad()
def subject_errors(subject: Subject, rows: Sequence[Row], times: Sequence[float]) -> Float64[Tensor, "T B"]:
    """Return the velocity's mean squared error of each image at each time, with the same noise at all times."""
    device, codec = subject.device, subject.codec
    arrays = collate(rows, codec.latent_shape(*rows[0].image.shape[:2]), posterior=codec.has_posterior)
    batch = arrays.tensors(lambda values: torch.from_numpy(values).to(device))
    latents, texts, errors = batch_latents(codec, batch), subject.texts(batch.captions), []
    target = velocity(latents, batch.noise)
    for time in times:
        t = torch.full((len(rows),), time, device=device)
        predicted = subject.velocity(path(latents, batch.noise, t), t, texts)
        errors.append((predicted.float() - target).square().flatten(1).double().mean(1))
    return torch.stack(errors)
