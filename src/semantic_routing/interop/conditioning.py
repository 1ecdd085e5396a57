"""Conditioning: prompts, null prompts and guidance of a pipeline's call, all of which callbacks may change."""

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
    """The text of a call's images, prepared again only if it changes or routing depends on time.

    ``ask_null`` is called when guidance first needs the null prompts.
    """

    def __init__(
        self,
        transformer: Any,
        prompt: TextFeatures,
        ask_null: Callable[[], TextFeatures],
        products: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """Condition on ``prompt``; ``products`` returns a context that sets the type of matrix products."""
        self.prompt = prompt
        self._transformer, self._products = transformer, products
        self._null: TextFeatures | None = None
        self._ask_null = ask_null
        self._parts: tuple[TextFeatures, ...] = ()
        self._plan = TextPlan(transformer, prompt)

    @property
    def null(self) -> TextFeatures:
        """Features of the null prompts: one per image, or one for all."""
        if self._null is None:
            self._null = self._ask_null()
        return self._null

    @null.setter
    def null(self, features: TextFeatures) -> None:
        self._null = features

    def velocity(
        self, x: Float[Tensor, " B *shape"], t: Float[Tensor, " 1"], scale: float
    ) -> Float[Tensor, " B *shape"]:
        """Return the velocity: guided if ``scale`` is above 1, else of the prompts alone."""
        self._read((self.prompt, self.null) if scale > 1 else (self.prompt,))
        return extrapolated(self._velocity, scale)(x, t) if scale > 1 else self._velocity(x, t)

    def _read(self, parts: tuple[TextFeatures, ...]) -> None:
        """Condition on ``parts``: the prompts, and with guidance also the null prompts."""
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts, strict=True)):
            self._parts = parts
            self._plan = TextPlan(self._transformer, join(*parts) if len(parts) > 1 else parts[0])

    def _velocity(self, x: Tensor, t: Tensor) -> Tensor:
        with self._products():
            return self._transformer(x, t, self._plan.at(x, t)).float()


def repeated(features: TextFeatures, times: int) -> TextFeatures:
    """Repeat the features of every prompt ``times`` times in a row."""

    def repeat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.repeat_interleave(times, dim=1)

    hidden, mask = features.hidden.repeat_interleave(times, dim=1), features.mask.repeat_interleave(times, dim=0)
    return TextFeatures(hidden, mask, repeat(features.keys), repeat(features.values))


def check_embeds(name: str, features: Any, cfg: DiTConfig, rows: tuple[int, ...]) -> TextFeatures:
    """Return the features; raise ValueError unless they fit the transformer and hold one of ``rows`` prompts."""
    if not isinstance(features, TextFeatures):
        raise ValueError(f"{name} is a {type(features).__name__}; expected what encode_prompt returns, TextFeatures")
    if features.mask.shape[0] not in rows:
        counts = " or ".join(map(str, sorted(set(rows))))
        raise ValueError(f"{name} holds {features.mask.shape[0]} prompts; expected {counts}")
    layers, width = features.hidden.shape[0], features.hidden.shape[-1]
    fused = cfg.strategy.reads_keys  # then the width of the hidden states does not matter
    if layers != cfg.text_layers or (width != cfg.text_width and not fused):
        raise ValueError(
            f"{name} has {layers} layers of width {width}, but this transformer reads {cfg.text_layers} layers of "
            f"width {cfg.text_width}: use encode_prompt of this transformer's own pipeline"
        )
    if fused and (features.keys is None or features.values is None):
        raise ValueError(
            f"{name} lacks keys and values, which arm fusedit reads: use encode_prompt of a pipeline with a transformer"
        )
    if features.mask.dtype != torch.bool or not features.mask.any(1).all():
        raise ValueError(f"the mask of {name} must be True on at least one token of every prompt")
    if not all(x is None or x.isfinite().all() for x in (features.hidden, features.keys, features.values)):
        raise ValueError(f"{name} holds NaN or infinity; encode the prompt again")
    return features
