"""Import path of the pipeline in folders that version 0.1 exported; the code is in ``interop/pipeline.py``."""

from semantic_routing.interop.pipeline import SemanticRoutingPipeline

__all__ = ["SemanticRoutingPipeline"]
