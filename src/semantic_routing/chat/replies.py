"""From a server's reply to an answer, in all known variants of OpenAI's protocol.

Contents are texts, parts, or nothing besides reasoning; tokens are words, pieces of a tokenizer or bytes;
log-probabilities are rows of objects, or the older lists of tokens with mappings beside them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from semantic_routing.chat.messages import Answer

THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks")
"""Fields of a message that hold what the model thought before it answered."""
THINKING = ("thinking", "reasoning", "thought", "redacted_thinking", "reasoning.text", "reasoning.summary")
"""Types of parts of a content that are thoughts."""
PIECES = str.maketrans({"\u2581": " ", "\u0120": " ", "\u010a": "\n", "\u0109": "\t", "\ufeff": " ", "\u200b": " "})
"""White space in the names of tokens: U+2581 of SentencePiece, the others of byte-level BPE."""
QUOTES = "\"'`\u201c\u201d\u2018\u2019"
NUMBERED = re.compile(r"token(_id)?:\d+|bytes:", re.IGNORECASE)
"""Names that give a token's number or bytes instead of its text."""

Likely = tuple[tuple[str, float], ...]


def read_answer(body: str) -> Answer:
    """Read the answer in a server's reply; ValueError says where it departs from the protocol."""
    try:
        reply = json.loads(body.removeprefix("\ufeff"))
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        text, thought = _content(message.get("content"))
        thought = thought or _thinks(message, usage)
        tokens = _tokens(choice.get("logprobs"))
        if tokens and thought and not _spells([likely[0][0] for likely in tokens], text):
            tokens = [()]  # they are of thoughts
        finish = choice.get("finish_reason") or ("refusal" if not text and message.get("refusal") else "")
        return Answer(
            text=text,
            logprobs=_distinct(tokens[0]) if tokens else None,
            model=_text(reply.get("model") or ""),
            finish=_text(str(finish)),
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
            thought=thought,
        )
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a chat completion: {' '.join(body.split())[:300]}") from error


def word(token: str) -> str:
    """Return a token in lower case without tokenizer marks, white space and quotes."""
    return token.translate(PIECES).removesuffix("</w>").strip().strip(QUOTES).strip().casefold()


def _content(content: Any) -> tuple[str, bool]:
    """Return the text of a content, and True if it holds thoughts too."""
    if content is None:
        return "", False
    if isinstance(content, str):
        return _text(content), False
    texts, thought = [], False
    for part in [content] if isinstance(content, Mapping) else content:
        if isinstance(part, str):
            texts.append(_text(part))
        elif part.get("type") in THINKING or part.get("thought") is True:
            thought = True
        elif part.get("text") is not None:
            text = part["text"]
            texts.append(_text(text["value"] if isinstance(text, Mapping) else text))
    return "".join(texts), thought


def _thinks(message: Mapping[str, Any], usage: Mapping[str, Any]) -> bool:
    """Return True if a reply has thoughts in separate fields, or counts tokens spent on them."""
    values = [message.get(name) for name in THOUGHTS]
    values.append((usage.get("completion_tokens_details") or {}).get("reasoning_tokens"))
    return any(value.strip() if isinstance(value, str) else value for value in values)


def _tokens(logprobs: Any) -> list[Likely]:
    """Return the likeliest choices for each token, the chosen one first."""
    if not logprobs:
        return []
    if isinstance(logprobs, Mapping) and not logprobs.get("content") and logprobs.get("tokens"):
        tokens = logprobs["tokens"]
        numbers = logprobs.get("token_logprobs") or [None] * len(tokens)
        others = logprobs.get("top_logprobs") or [None] * len(tokens)
        return [_with_chosen(*rows) for rows in zip(tokens, numbers, others, strict=False)]
    rows = logprobs if isinstance(logprobs, list) else logprobs.get("content") or []
    return [_with_chosen(_name(row), row.get("logprob"), row.get("top_logprobs")) for row in rows]


def _with_chosen(token: Any, number: Any, others: Any) -> Likely:
    """Return the chosen token, then the others; servers list it among them, rename it, or leave it out."""
    chosen, listed = (_text(token), _logprob(number)), _likely(others)
    if listed and (number is None or any(word(name) == word(chosen[0]) for name, _ in listed)):
        same = [row for row in listed if word(row[0]) == word(chosen[0])]
        return (*same, *(row for row in listed if row not in same))
    return (chosen, *listed)


def _likely(found: Any) -> Likely:
    """Return tokens with their log-probabilities from a mapping or from rows."""
    if not found:
        return ()
    if isinstance(found, Mapping):
        items: Iterable[tuple[Any, Any]] = found.items()
    else:
        items = ((_name(row), row.get("logprob")) if isinstance(row, Mapping) else row for row in found)
    return tuple((_text(name), _logprob(value)) for name, value in items)


def _name(row: Mapping[str, Any]) -> str:
    """Return a token's text, or decode its bytes if it has none."""
    token, raw = row.get("token"), row.get("bytes")
    if raw and (not token or NUMBERED.match(token)):
        return bytes(raw).decode("utf-8", "replace")
    return _text(token or "")


def _logprob(value: Any) -> float:
    """Read a log-probability; JSON has no infinity, so servers write null, a text or -9999."""
    if isinstance(value, Mapping):
        value = value.get("logprob")
    return -math.inf if value is None else float(value)


def _distinct(likely: Likely) -> Likely:
    """Return rows without repeated tokens."""
    return tuple(dict.fromkeys(likely))


def _spells(tokens: Iterable[str], text: str) -> bool:
    """Return True if tokens spell the text, ignoring special tokens and white space."""
    joined = re.sub(r"<[^<>\s]*>", "", "".join(tokens).translate(PIECES))
    return bool(text.strip()) and "".join(joined.split()) == "".join(text.split())


def _text(value: Any) -> str:
    """Return text that UTF-8 can encode: JSON may hold halves of surrogate pairs."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value.encode("utf-8", "replace").decode()
