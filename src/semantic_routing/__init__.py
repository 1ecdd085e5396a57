"""Semantic Routing: condition text-to-image diffusion transformers on all layers of a language model."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

FACES = {
    "SemanticRoutingPipeline": "pipeline",
    "SemanticRoutingTransformer": "transformer",
    "ModelMixin": "transformer",  # by which diffusers knows how to load the transformer
}
"""What exported pipelines call by the package's name, and the file where it is; read when first asked for."""


def __getattr__(name: str) -> Any:
    if name not in FACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{FACES[name]}"), name)
