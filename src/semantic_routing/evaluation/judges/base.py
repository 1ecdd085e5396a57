"""Vision-language models as judges, over an OpenAI-compatible server: VQAScore and UnifiedReward.

An answer that cannot be parsed is recorded as a missing score with its reason, and never as a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from semantic_routing.chat.client import ChatClient
from semantic_routing.chat.messages import Answer, Failure, Picture, Question
from semantic_routing.common.images.decode import BROKEN, to_rgb
from semantic_routing.common.images.formats import formats
from semantic_routing.evaluation.benchmark import Finding, Task

PROMPT = "{prompt}"
NO_THINKING = (
    'turn reasoning off, such as with --judge.extra \'{"chat_template_kwargs": {"enable_thinking": false}}\' on vLLM '
    'and SGLang or \'{"reasoning_effort": "none"}\' elsewhere, or use a judge that does not reason first'
)


def open_rgb(path: Path) -> Image.Image | Failure:
    """Open an image file as upright RGB."""
    try:
        with Image.open(path, formats=formats()) as image:
            return to_rgb(image)
    except BROKEN as error:
        return Failure(reason="the image cannot be opened", detail=f"{path}: {error}", final=True)


def read_picture(path: Path, quality: int | None = None) -> Picture | Failure:
    """Encode an image file for a request: as JPEG of that quality, or as lossless PNG."""
    image = open_rgb(path)
    return image if isinstance(image, Failure) else Picture.encode(image, quality)


def checked_template(template: str, place: str, what: str) -> str:
    """Return the template; ValueError if it has no place for the prompt."""
    if place not in template:
        raise ValueError(f"{what} has no {place}; write it in place of the prompt")
    return template


def sha256(text: str) -> str:
    """Return the SHA-256 of the text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _judged(
    client: ChatClient,
    tasks: Sequence[Task],
    question: Callable[[Task], Question | Failure],
    read: Callable[[Answer], Finding],
    metrics: Sequence[str],
) -> Iterator[tuple[Task, Finding]]:
    for task, answer in client.run(tasks, question):
        if isinstance(answer, Answer):
            yield task, read(answer)
        else:
            yield task, Finding(scores=dict.fromkeys(metrics), reason=str(answer))


def _identity(scorer: str, client: ChatClient, template: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "scorer": scorer,
        **client.identity(),
        "template": template,
        "template_sha256": sha256(template),
        "parameters": parameters,
    }
