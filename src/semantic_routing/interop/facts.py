"""Facts that a pipeline needs and that no component holds; they are saved in the transformer's configuration.

A pipeline that is built from another pipeline's components therefore samples the same images.
"""

from __future__ import annotations

from typing import Any

from semantic_routing.interop.numerals import whole
from semantic_routing.model.codec import Codec, VAECodec

NEEDED = {"image_size": "256", "null_prompt": "''", "text": "{'layers': 'all'}"}
"""Facts without a default, each with an example."""
PRECISIONS = ("auto", "bf16", "fp32")


def resolve(transformer: Any, **given: Any) -> dict[str, Any]:
    """Fill facts that are None from the transformer's configuration; raise ValueError if it lacks them, too."""
    kept = {} if transformer is None else transformer.config.get("facts") or {}
    facts = {name: kept.get(name) if value is None else value for name, value in given.items()}
    facts["precision"] = facts["precision"] or "auto"
    if missing := {name: example for name, example in NEEDED.items() if facts[name] is None}:
        examples = ", ".join(f"{name}={example}" for name, example in missing.items())
        raise ValueError(
            f"the transformer's configuration lacks {' and '.join(missing)}: give the pipeline the values of training, "
            f"such as {examples}"
        )
    if facts["precision"] not in PRECISIONS:
        raise ValueError(f"unknown precision {facts['precision']!r}; use one of {', '.join(PRECISIONS)}")
    return facts | {"image_size": whole("image_size", facts["image_size"])}


def latents_of(codec: Codec) -> dict[str, Any]:
    """Return the settings that determine the meaning of a codec's latents."""
    if not isinstance(codec, VAECodec):
        return {"kind": "pixels"}
    return {"kind": "vae", "factor": codec.factor, "shift": codec.shift, "scale": codec.scale}


def check_latents(transformer: Any, codec: Codec) -> None:
    """Raise ValueError if a codec's latents are not of the kind that the transformer was trained on."""
    trained, given = (transformer.config.get("facts") or {}).get("codec"), latents_of(codec)
    if trained is not None and trained != given:
        raise ValueError(
            f"this transformer samples {_described(trained)}, but the pipeline decodes {_described(given)}: use "
            f"{'vae=None' if trained['kind'] == 'pixels' else 'the VAE it was trained with'}"
        )


def _described(latents: dict[str, Any]) -> str:
    sizes = ", ".join(f"{name} {value:g}" for name, value in latents.items() if name != "kind")
    return f"latents of a VAE ({sizes})" if sizes else "pixels"
