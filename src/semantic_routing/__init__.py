"""Semantic Routing: condition text-to-image diffusion transformers on all layers of a large language model.

    import semantic_routing as sr

    model = sr.load("runs/quickstart")
    images = model.sample(["a red circle"], cfg=sr.SampleConfig(guidance=3.0))

``load``, ``train`` and ``recipes`` work with whole runs; ``TextEncoder`` and ``DiT`` are the parts of a model;
``adopt`` puts routing on a pretrained diffusers pipeline. Names are imported on first use, so that importing the
package itself is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from semantic_routing.adopt.api import adopt, load_routing
    from semantic_routing.adopt.routing import Routing
    from semantic_routing.data.dataset import DataConfig, open_data
    from semantic_routing.evaluation.run import evaluate_images, evaluate_model
    from semantic_routing.interop.open import load
    from semantic_routing.interop.pipeline import SemanticRoutingPipeline
    from semantic_routing.interop.transformer import SemanticRoutingTransformer
    from semantic_routing.interop.upstream import from_upstream, to_upstream
    from semantic_routing.model.arms import ARMS, Arm
    from semantic_routing.model.build import make_model
    from semantic_routing.model.codec import Codec, PixelCodec, VAECodec
    from semantic_routing.model.context import TextContext
    from semantic_routing.model.dit import DiT, DiTConfig
    from semantic_routing.model.fusedit import FuseDiT
    from semantic_routing.model.override import RoutingOverride
    from semantic_routing.model.routing import Router, make_router, mix
    from semantic_routing.sampling.guidance import guided
    from semantic_routing.sampling.routing_file import overridden
    from semantic_routing.sampling.samplers import euler, euler_ancestral, heun, noise_for, renoise, schedule
    from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
    from semantic_routing.text.config import TextEncoderConfig
    from semantic_routing.text.encoder import TextEncoder
    from semantic_routing.text.features import TextFeatures
    from semantic_routing.training import recipes
    from semantic_routing.training.config import TrainConfig
    from semantic_routing.training.loop import resume
    from semantic_routing.training.loop import start as train

_MODULES = {
    "adopt.api": ("adopt", "load_routing"),
    "adopt.routing": ("Routing",),
    "data.dataset": ("DataConfig", "open_data"),
    "evaluation.run": ("evaluate_images", "evaluate_model"),
    "interop.open": ("load",),
    "interop.pipeline": ("SemanticRoutingPipeline",),
    "interop.transformer": ("SemanticRoutingTransformer",),
    "interop.upstream": ("from_upstream", "to_upstream"),
    "model.arms": ("ARMS", "Arm"),
    "model.build": ("make_model",),
    "model.codec": ("Codec", "PixelCodec", "VAECodec"),
    "model.context": ("TextContext",),
    "model.dit": ("DiT", "DiTConfig"),
    "model.fusedit": ("FuseDiT",),
    "model.override": ("RoutingOverride",),
    "model.routing": ("Router", "make_router", "mix"),
    "sampling.guidance": ("guided",),
    "sampling.routing_file": ("overridden",),
    "sampling.samplers": ("euler", "euler_ancestral", "heun", "noise_for", "renoise", "schedule"),
    "sampling.text_to_image": ("SampleConfig", "TextToImage"),
    "text.config": ("TextEncoderConfig",),
    "text.encoder": ("TextEncoder",),
    "text.features": ("TextFeatures",),
    "training.config": ("TrainConfig",),
    "training.loop": ("resume", "train"),
}
"""Public names by module."""
_MODULE_NAMES = {"recipes": "training.recipes"}
"""Public names that are modules themselves."""
_RENAMED = {"train": "start"}
"""Public names that differ from the name in their module."""
_UNLISTED = {"ModelMixin": "interop.transformer"}
"""Names that diffusers looks up to load the transformer of an exported pipeline."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names} | _UNLISTED

__all__ = [
    "ARMS",
    "Arm",
    "Codec",
    "DataConfig",
    "DiT",
    "DiTConfig",
    "FuseDiT",
    "PixelCodec",
    "Router",
    "Routing",
    "RoutingOverride",
    "SampleConfig",
    "SemanticRoutingPipeline",
    "SemanticRoutingTransformer",
    "TextContext",
    "TextEncoder",
    "TextEncoderConfig",
    "TextFeatures",
    "TextToImage",
    "TrainConfig",
    "VAECodec",
    "__version__",
    "adopt",
    "euler",
    "euler_ancestral",
    "evaluate_images",
    "evaluate_model",
    "from_upstream",
    "guided",
    "heun",
    "load",
    "load_routing",
    "make_model",
    "make_router",
    "mix",
    "noise_for",
    "open_data",
    "overridden",
    "recipes",
    "renoise",
    "resume",
    "schedule",
    "to_upstream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_NAMES:
        return import_module(f"{__name__}.{_MODULE_NAMES[name]}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
