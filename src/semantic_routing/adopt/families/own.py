"""Pipelines of this program: the mix of their router is the original state of each block."""

from __future__ import annotations

from semantic_routing.adopt.families.family import Family, named_if

OWN = Family(
    name="semantic-routing",
    kind="own",
    transformer="SemanticRoutingTransformer",
    refuses=lambda transformer, layers: (
        named_if(not hasattr(transformer.backbone, "router"), f"arm {transformer.config.arm!r}, which has no router")
        or named_if(
            transformer.backbone.cfg.strategy.finer,
            f"arm {transformer.config.arm!r}, whose blocks read several texts",
        )
    ),
)
