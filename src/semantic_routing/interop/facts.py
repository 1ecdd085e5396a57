"""What a pipeline must know of a model and none of its parts would say: it is kept with the transformer's sizes.

So a pipeline that is built around another's components draws what that one draws.
"""

from __future__ import annotations

from typing import Any

from semantic_routing.interop.numerals import whole
from semantic_routing.model.codec import Codec, VAECodec

NEEDED = {"image_size": "256", "null_prompt": "''", "text": "{'layers': 'all'}"}
"""Names, each with an example."""
PRECISIONS = ("auto", "bf16", "fp32")


def resolve(transformer: Any, **given: Any) -> dict[str, Any]:
    """What was given and, where it is None, what the transformer's configuration says; ValueError if neither does."""
    kept = {} if transformer is None else transformer.config.get("facts") or {}
    facts = {name: kept.get(name) if value is None else value for name, value in given.items()}
    facts["precision"] = facts["precision"] or "auto"
    if missing := {name: example for name, example in NEEDED.items() if facts[name] is None}:
        examples = ", ".join(f"{name}={example}" for name, example in missing.items())
        raise ValueError(
            f"the transformer's configuration does not tell {' and '.join(missing)} of the model: give them to the "
            f"pipeline as they were in training, such as {examples}"
        )
    if facts["precision"] not in PRECISIONS:
        raise ValueError(f"unknown precision {facts['precision']!r}; use one of {', '.join(PRECISIONS)}")
    return facts | {"image_size": whole("image_size", facts["image_size"])}


def latents_of(codec: Codec) -> dict[str, Any]:
    """What decides the meaning of a codec's latents."""
    if not isinstance(codec, VAECodec):
        return {"kind": "pixels"}
    return {"kind": "vae", "factor": codec.factor, "shift": codec.shift, "scale": codec.scale}


def check_latents(transformer: Any, codec: Codec) -> None:
    """ValueError where a codec gives other latents than those that the transformer is known to draw."""
    drawn, offered = (transformer.config.get("facts") or {}).get("codec"), latents_of(codec)
    if drawn is not None and drawn != offered:
        raise ValueError(
            f"this transformer draws {_described(drawn)}, but the pipeline decodes {_described(offered)}: "
            f"use the vae it was trained with{', which is none' if drawn['kind'] == 'pixels' else ''}"
        )


def _described(latents: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {value:g}" for name, value in latents.items() if name != "kind")
    return f"latents of a VAE ({sizes})" if sizes else "pixels"
