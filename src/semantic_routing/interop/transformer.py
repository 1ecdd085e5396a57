"""The network of any arm as a model of diffusers: its files, its LoRA adapters, its hooks for offload and types."""

from __future__ import annotations

from dataclasses import asdict
from inspect import Signature, signature
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from jaxtyping import Float
from torch import Tensor

from semantic_routing.model.build import make_model
from semantic_routing.model.context import TextContext
from semantic_routing.model.dit import Backbone, DiTConfig
from semantic_routing.text.features import TextFeatures


def _fields_of_config(init: Any) -> Any:
    """Show the fields of ``DiTConfig`` as arguments: diffusers reads a model's settings off its signature."""
    own, facts, _ = signature(init).parameters.values()
    init.__signature__ = Signature([own, *signature(DiTConfig).parameters.values(), facts])
    return init


class SemanticRoutingTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A ``Backbone`` with the ``save_pretrained`` and ``from_pretrained`` of diffusers.

    Its configuration is ``DiTConfig``'s, field by field, and the ``facts`` that pipelines need (``facts.py``); its
    weights are those of ``backbone``. Time and sign are this program's (``flow.py``); ``SemanticRoutingPipeline``
    translates for schedulers.
    """

    _no_split_modules: ClassVar[list[str]] = ["Block", "FuseBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["Block", "FuseBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["router"]
    # Text is prepared by parts of all blocks at once, which offloading a block at a time cannot foresee.
    _supports_group_offloading = False

    @register_to_config
    @_fields_of_config
    def __init__(self, *, facts: dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__()
        self.backbone: Backbone = make_model(DiTConfig(**fields))

    @classmethod
    def from_backbone(cls, backbone: Backbone) -> SemanticRoutingTransformer:
        """The transformer around a network, whose weights it shares."""
        with torch.device("meta"):
            transformer = cls(**asdict(backbone.cfg))
        transformer.backbone = backbone
        return transformer

    @property
    def depends_on_time(self) -> bool:
        """Whether the text must be prepared anew for every time; if not, once a prompt is enough."""
        return self.backbone.depends_on_time

    @apply_forward_hook
    def gate_time(self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"]) -> Float[Tensor, " T_or_B"]:
        """The time that ``prepare_text`` is to be told: the nominal one unless routing reads it from ``x``."""
        return self.backbone.gate_time(x, t)

    @apply_forward_hook
    def prepare_text(self, features: TextFeatures, t: Float[Tensor, " T"] | None = None) -> TextContext:
        """Every block's keys and values of these prompts, at times ``t`` where routing depends on time."""
        return self.backbone.prepare_text(features, t)

    def forward(
        self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"], context: TextContext
    ) -> Float[Tensor, "B Ch h w"]:
        """Velocity (data minus noise) at the noisy latents ``x`` and times ``t`` (0 noise, 1 data)."""
        return self.backbone(x, t, context)


# Files name the package's face, so that the code may move; see ``semantic_routing.__getattr__``.
SemanticRoutingTransformer.__module__ = "semantic_routing"
