"""Prompts written in a language model's chat template."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any


def in_chat(tokenizer: Any, texts: Sequence[str], name: str, *, strict: bool = True) -> list[str]:
    """Write each text as a user's message.

    Raises ValueError if the template leaves a text out or changes it; with ``strict=False`` a changed text is only a
    warning.
    """
    form = _form(tokenizer, name)
    return [_whole(tokenizer, form, text, name, strict) for text in texts]


def _form(tokenizer: Any, name: str) -> int:
    """Return the index of the first of ``_messages`` that the template renders with its text; ValueError if none."""
    from jinja2 import TemplateError

    reason = "it leaves the prompt out"
    for form in range(len(_messages(""))):
        try:
            if "red circle" in _render(tokenizer, form, "red circle").lower():
                return form
        except (TemplateError, TypeError) as error:
            reason = " ".join(str(error).split())
    raise ValueError(f"the chat template of {name!r} cannot format a prompt ({reason}): set chat_template=False")


def _render(tokenizer: Any, form: int, text: str) -> str:
    return tokenizer.apply_chat_template(_messages(text)[form], tokenize=False, add_generation_prompt=True)


def _whole(tokenizer: Any, form: int, text: str, name: str, strict: bool) -> str:
    """Render a text; ValueError, or a warning, if more of it changes than case and spaces."""
    rendered = _render(tokenizer, form, text)
    if "".join(text.lower().split()) not in "".join(rendered.lower().split()):
        what = f"the chat template of {name!r} changes {text!r}: set chat_template=False"
        if strict:
            raise ValueError(what)
        warnings.warn(what, stacklevel=6)
    return rendered


def _messages(text: str) -> list[list[dict[str, Any]]]:
    """Return the forms of messages that chat templates accept: a text, a list of parts, a text after a system text."""
    system = [{"role": "system", "content": ""}]
    plain: list[dict[str, Any]] = [{"role": "user", "content": text}]
    listed: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    return [plain, listed, [*system, *plain]]
