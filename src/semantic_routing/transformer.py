"""The network of any arm as a model of diffusers: its files, its LoRA adapters, its hooks for offload and types."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from jaxtyping import Float
from torch import Tensor

from semantic_routing.dit import Backbone, DiTConfig, TextContext
from semantic_routing.features import TextFeatures
from semantic_routing.fusedit import make_model


class SemanticRoutingTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A ``Backbone`` with the ``save_pretrained`` and ``from_pretrained`` of diffusers.

    Its configuration is ``DiTConfig``'s, field by field; its weights are those of ``backbone``. Time and sign
    are this program's (``flow.py``); ``SemanticRoutingPipeline`` translates for schedulers.
    """

    _no_split_modules = ["Block", "FuseBlock"]
    _repeated_blocks = ["Block", "FuseBlock"]
    _keep_in_fp32_modules = ["router"]
    # Text is prepared by parts of all blocks at once, which offloading a block at a time cannot foresee.
    _supports_group_offloading = False

    @register_to_config
    def __init__(
        self,
        arm: str = "depth",
        depth: int = 24,
        width: int = 2048,
        heads: int = 32,
        kv_heads: int = 8,
        head_dim: int = 128,
        mlp_width: int = 8192,
        activation: Literal["gelu_tanh", "silu"] = "silu",
        patch: int = 2,
        channels: int = 16,
        text_width: int = 2560,
        text_layers: int = 36,
        conditioning: Literal["none", "adaln-zero", "adaln-single", "addition"] = "none",
        prediction: Literal["velocity", "image"] = "velocity",
        rope_theta: float = 1e4,
        text_init_std: float = 0.02,
        fusedit_first_layer: int = 6,
    ) -> None:
        super().__init__()
        cfg = DiTConfig(
            arm=arm,
            depth=depth,
            width=width,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            mlp_width=mlp_width,
            activation=activation,
            patch=patch,
            channels=channels,
            text_width=text_width,
            text_layers=text_layers,
            conditioning=conditioning,
            prediction=prediction,
            rope_theta=rope_theta,
            text_init_std=text_init_std,
            fusedit_first_layer=fusedit_first_layer,
        )
        self.backbone: Backbone = make_model(cfg)

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
    def prepare_text(self, features: TextFeatures, t: Float[Tensor, " B"] | None = None) -> TextContext:
        """Every block's keys and values of these prompts, at times ``t`` where routing depends on time."""
        return self.backbone.prepare_text(features, t)

    def forward(
        self, x: Float[Tensor, "B Ch h w"], t: Float[Tensor, " B"], context: TextContext
    ) -> Float[Tensor, "B Ch h w"]:
        """Velocity (data minus noise) at the noisy latents ``x`` and times ``t`` (0 noise, 1 data)."""
        return self.backbone(x, t, context)
