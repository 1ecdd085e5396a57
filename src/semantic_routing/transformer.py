"""Where pipelines that version 0.1 exported look for the transformer; it is in ``interop/transformer.py``."""

from semantic_routing.interop.transformer import ModelMixin, SemanticRoutingTransformer

__all__ = ["ModelMixin", "SemanticRoutingTransformer"]
