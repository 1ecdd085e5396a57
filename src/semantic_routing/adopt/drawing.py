"""Drawing: the settings with which an adopted pipeline samples images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from semantic_routing.sampling.samplers import SamplerName
from semantic_routing.sampling.text_to_image import check_guidance


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How an adopted pipeline samples images; None means the pipeline's own default."""

    steps: int | None = None
    """Number of sampling steps."""
    guidance: float | None = None
    """Classifier-free guidance scale, the pipeline's guidance_scale."""
    seed: int = 0
    """Random seed; together with prompt index and image index it determines an image's noise."""
    batch: int = 16
    """Number of images sampled together, for this program's own pipelines; others sample one image at a time."""
    sampler: SamplerName | None = None
    """Sampler, only for this program's own pipelines."""
    shift: float | None = None
    """Timestep shift, only for this program's own pipelines: above 1, more steps are near the noise."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.guidance is not None:
            check_guidance(self.guidance)
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ValueError(f"shift is {self.shift}; it must be above 0 and finite")
