"""Chooses the caption of a sample: one of several keys, and one of several texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from semantic_routing.common.errors import BadData

USUAL = ("txt", "text", "caption", "prompt")
"""Default caption keys: the first of these that a record has."""

LIKELY = ("caption", "text", "prompt", "description")
"""Words in the names of keys that hold captions."""


class CaptionChoice:
    """Picks one caption of a record by two random numbers."""

    def __init__(self, keys: Sequence[str] = (), weights: Sequence[float] = (), *, prefer: str = "") -> None:
        """Choose among ``keys`` by their weights; without keys, take ``prefer`` or else the first key of ``USUAL``."""
        if weights and len(weights) != len(keys):
            raise ValueError(f"{len(weights)} caption weights for {len(keys)} caption keys; give one for each key")
        if len(set(keys)) < len(keys):
            raise ValueError(f"caption keys {tuple(keys)} contain one twice; give each once")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"caption weights {tuple(weights)} must be above 0; leave out unwanted keys")
        self.usual = (prefer, *USUAL) if prefer else USUAL
        self.weights = dict(zip(keys, weights or [1.0] * len(keys), strict=True))

    def choose(self, captions: Mapping[str, tuple[str, ...]], key_uniform: float, text_uniform: float) -> str:
        """Choose the key and one of its texts by two numbers in [0, 1); raise BadData if there is no caption."""
        texts = captions.get(self._key(captions, key_uniform), ())
        if not texts:
            raise BadData("no caption", f"found {', '.join(sorted(captions)) or 'none at all'}")
        return texts[int(text_uniform * len(texts))].strip()

    def missing(self, there: Sequence[str]) -> str:
        """Return the message for records without these keys; ``there`` are their keys, longest captions first."""
        wanted = ", ".join(self.weights or self.usual)
        if not there:
            return (
                f"no captions ({wanted}); put a .txt file beside each picture, or have them described by "
                "semroute data recaption and give --data.sidecar"
            )
        likely = next((key for key in there if any(word in key.lower() for word in LIKELY)), there[0])
        return (
            f"no captions under {wanted}, but there are {', '.join(there)}; choose with --data.caption-keys {likely} "
            f"(of semroute data preview: --caption-keys {likely})"
        )

    def _key(self, captions: Mapping[str, tuple[str, ...]], uniform: float) -> str:
        if not self.weights:
            return next((key for key in self.usual if captions.get(key)), "")
        there = [key for key in self.weights if captions.get(key)]
        left = uniform * sum(self.weights[key] for key in there)
        for key in there:
            left -= self.weights[key]
            if left < 0:
                return key
        return there[-1] if there else ""
