"""Where pipelines that version 0.1 exported look for the pipeline; it is in ``interop/pipeline.py``."""

from semantic_routing.interop.pipeline import SemanticRoutingPipeline

__all__ = ["SemanticRoutingPipeline"]
