"""What a pipeline's call tells the transformer: the text of each image, of its null prompt, and the guidance of both.

All of it may be exchanged between steps, as callbacks of diffusers do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.model.dit import DiTConfig
from semantic_routing.sampling.guidance import extrapolated, join
from semantic_routing.sampling.text_plan import TextPlan
from semantic_routing.text.features import TextFeatures


class Conditioning:
    """The text that a call's images are drawn from; it is prepared anew only when it, or what it depends on, changes.

    ``null`` is asked for when guidance first needs it.
    """

    def __init__(
        self,
        transformer: Any,
        prompt: TextFeatures,
        ask_null: Callable[[], TextFeatures],
        products: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """``products`` makes a context in which matrix products have their type."""
        self.prompt = prompt
        self._transformer, self._products = transformer, products
        self._null: TextFeatures | None = None
        self._ask_null = ask_null
        self._parts: tuple[TextFeatures, ...] = ()
        self._plan = TextPlan(transformer, prompt)

    @property
    def null(self) -> TextFeatures:
        """Features of the null prompts: one for each image, or one for all."""
        if self._null is None:
            self._null = self._ask_null()
        return self._null

    @null.setter
    def null(self, features: TextFeatures) -> None:
        self._null = features

    def velocity(
        self, x: Float[Tensor, " B *shape"], t: Float[Tensor, " 1"], scale: float
    ) -> Float[Tensor, " B *shape"]:
        """The velocity at latents and time: guided where ``scale`` is above 1, else of the prompts alone."""
        self._read((self.prompt, self.null) if scale > 1 else (self.prompt,))
        return extrapolated(self._velocity, scale)(x, t) if scale > 1 else self._velocity(x, t)

    def _read(self, parts: tuple[TextFeatures, ...]) -> None:
        """Make ``parts``, prompts and their null prompts where there is guidance, what the transformer is told."""
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            self._parts = parts
            self._plan = TextPlan(self._transformer, join(*parts) if len(parts) > 1 else parts[0])

    def _velocity(self, x: Tensor, t: Tensor) -> Tensor:
        with self._products():
            return self._transformer(x, t, self._plan.at(x, t)).float()


def repeated(features: TextFeatures, times: int) -> TextFeatures:
    """The features of every prompt ``times`` times in a row."""

    def repeat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(times, dim=1)

    hidden, mask = features.hidden.repeat_interleave(times, dim=1), features.mask.repeat_interleave(times, dim=0)
    return TextFeatures(hidden, mask, repeat(features.keys), repeat(features.values))


def check_embeds(name: str, features: Any, cfg: DiTConfig, rows: tuple[int, ...]) -> TextFeatures:
    """The features, if they are what ``encode_prompt`` returns for this transformer and one of ``rows`` prompts."""
    if not isinstance(features, TextFeatures):
        raise ValueError(f"{name} is a {type(features).__name__}; expected what encode_prompt returns, TextFeatures")
    if features.mask.shape[0] not in rows:
        counts = " or ".join(map(str, sorted(set(rows))))
        raise ValueError(f"{name} holds {features.mask.shape[0]} prompts; expected {counts}")
    layers, width = features.hidden.shape[0], features.hidden.shape[-1]
    fused = cfg.strategy.reads_keys  # whose width is of no consequence, as it reads the keys
    if layers != cfg.text_layers or (width != cfg.text_width and not fused):
        raise ValueError(
            f"{name} has {layers} layers of width {width}, but this transformer reads {cfg.text_layers} layers of "
            f"width {cfg.text_width}: use encode_prompt of the pipeline that it came with"
        )
    if fused and (features.keys is None or features.values is None):
        raise ValueError(f"{name} lacks keys and values, which arm fusedit reads: encode with the transformer in place")
    if features.mask.dtype != torch.bool or not features.mask.any(1).all():
        raise ValueError(f"the mask of {name} must be True on one token of every prompt at least")
    if not all(x is None or x.isfinite().all() for x in (features.hidden, features.keys, features.values)):
        raise ValueError(f"{name} holds values that are not finite; encode the prompt again")
    return features
