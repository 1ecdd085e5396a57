"""The network of any arm as a diffusers model: files, LoRA adapters, hooks for offloading and types."""

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
    """Add the fields of ``DiTConfig`` to a signature, from which diffusers reads a model's settings."""
    own, facts, _ = signature(init).parameters.values()
    init.__signature__ = Signature([own, *signature(DiTConfig).parameters.values(), facts])
    return init


class SemanticRoutingTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A network (``DiT`` or ``FuseDiT``) with the ``save_pretrained`` and ``from_pretrained`` of diffusers.

    Its configuration holds the fields of ``DiTConfig`` and the ``facts`` that pipelines need (``facts.py``). Its
    weights are those of ``backbone``. Time and sign are this program's (0 noise, 1 data; data minus noise);
    ``SemanticRoutingPipeline`` converts them for schedulers.
    """

    _no_split_modules: ClassVar[list[str]] = ["Block", "FuseBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["Block", "FuseBlock"]
    _keep_in_fp32_modules: ClassVar[list[str]] = ["router"]
    # prepare_text uses parts of all blocks at once, but group offloading expects one block after another.
    _supports_group_offloading = False

    @register_to_config
    @_fields_of_config
    def __init__(self, *, facts: dict[str, Any] | None = None, **fields: Any) -> None:
        super().__init__()
        self.backbone: Backbone = make_model(DiTConfig(**fields))

    @classmethod
    def from_backbone(cls, backbone: Backbone) -> SemanticRoutingTransformer:
        """Wrap a network; the weights are shared."""
        with torch.device("meta"):
            transformer = cls(**asdict(backbone.cfg))
        transformer.backbone = backbone
        return transformer

    @property
    def depends_on_time(self) -> bool:
        """Whether routing depends on time, so that the text must be prepared for every time."""
        return self.backbone.depends_on_time

    @apply_forward_hook
    def gate_time(self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"]) -> Float[Tensor, " T_or_B"]:
        """Return the gate time for ``prepare_text``: the nominal one, or an estimate from ``x`` in state-aware arms."""
        return self.backbone.gate_time(x, t)

    @apply_forward_hook
    def prepare_text(self, features: TextFeatures, t: Float[Tensor, " T"] | None = None) -> TextContext:
        """Compute every block's keys and values of these prompts, at gate times ``t`` if routing depends on time."""
        return self.backbone.prepare_text(features, t)

    def forward(
        self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " T"], context: TextContext
    ) -> Float[Tensor, "B Ch h w"]:
        """Return the velocity (data minus noise) at the noisy latents ``x`` and times ``t`` (0 noise, 1 data)."""
        return self.backbone(x, t, context)


# Files name the package and not this module, so that the code may move; see ``semantic_routing.__getattr__``.
SemanticRoutingTransformer.__module__ = "semantic_routing"
