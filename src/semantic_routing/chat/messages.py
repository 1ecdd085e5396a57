"""Questions to a vision-language model, their answers, and a cache of every answer.

The cache is content-addressed: an entry's name is the SHA-256 of the model, the messages (images by their SHA-256), the
parameters and the template, so the same question is never paid for twice, in any run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

ENTRY = re.compile(r"[0-9a-f]{64}\.json")
"""The name of an answer's file."""


@dataclass(frozen=True)
class Picture:
    """An encoded image, as it is sent."""

    data: bytes = field(repr=False)
    media_type: str
    """Such as image/jpeg."""

    @classmethod
    def encode(cls, image: Image.Image, quality: int | None = None) -> Picture:
        """Encode an RGB picture as JPEG of that quality (1 to 100), or losslessly as PNG."""
        buffer = io.BytesIO()
        if quality is None:
            image.save(buffer, format="PNG", compress_level=1)
            return cls(buffer.getvalue(), "image/png")
        image.save(buffer, format="JPEG", quality=quality)
        return cls(buffer.getvalue(), "image/jpeg")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def url(self) -> str:
        """Return the picture as a data URL."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode()}"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One message of a user, and the parameters of the request."""

    parts: tuple[str | Picture, ...]
    """Texts and pictures in the order in which the model sees them."""
    parameters: Mapping[str, Any]
    """Of the request, such as ``{"max_tokens": 1, "logprobs": True}``; JSON types only."""
    template: str = ""
    """Hash of the template that the text was made from; part of the question's identity."""

    def facts(self, model: str) -> dict[str, Any]:
        """Return everything that affects the answer as JSON; a picture is its hash."""
        parts = [part if isinstance(part, str) else {"sha256": part.sha256} for part in self.parts]
        return {"model": model, "parts": parts, "parameters": dict(self.parameters), "template": self.template}

    def message(self) -> dict[str, Any]:
        """Return the message in the format of the protocol."""
        return {
            "role": "user",
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image_url", "image_url": {"url": part.url}}
                for part in self.parts
            ],
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer."""

    text: str
    logprobs: tuple[tuple[str, float], ...] | None
    """The likeliest first tokens with their log-probabilities; None if the server gave none, empty if the first
    tokens are of thoughts."""
    model: str
    """As the server names it."""
    finish: str
    """Why it ended: stop, length, content_filter ..."""
    prompt_tokens: int
    completion_tokens: int
    question: str = ""
    """SHA-256 of the question, its name in the cache."""
    cached: bool = False
    """Whether it came from the cache, and so cost nothing."""
    thought: bool = False
    """Whether the server reported reasoning besides the text."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no answer."""

    reason: str
    """A few fixed words, so that failures can be counted: HTTP 500, timeout, malformed answer ..."""
    detail: str = ""
    """The exact reason."""
    final: bool = False
    """Whether asking again would fail in the same way: an image that cannot be opened, a question that was refused."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def digest(facts: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON facts in hexadecimal."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
