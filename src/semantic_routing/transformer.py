"""Import path of the transformer in folders that version 0.1 exported; the code is in ``interop/transformer.py``."""

from semantic_routing.interop.transformer import ModelMixin, SemanticRoutingTransformer

__all__ = ["ModelMixin", "SemanticRoutingTransformer"]
