"""An OpenAI-compatible server: its address, a single attempt at a question, and clear messages for what goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from semantic_routing.chat.messages import Answer, Failure, Question
from semantic_routing.chat.replies import read_answer
from semantic_routing.common.connection import way_to
from semantic_routing.common.extras import require

USUAL_KEY = "OPENAI_API_KEY"
"""Environment variable of the key if none is named; it may be unset."""
KEYLESS = "EMPTY"
"""Sent where the environment holds no key: servers of one's own mostly want none."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A server, a model, and the rate and retries of requests. The API key is read only from the environment."""

    base_url: str = "http://127.0.0.1:8000/v1"
    """The server's address, which usually ends in /v1."""
    model: str = ""
    """Name of the model on the server."""
    api_key_env: str = USUAL_KEY
    """Name of the environment variable that holds the key; servers without keys need none."""
    concurrency: int = 32
    """Number of concurrent requests of each process."""
    timeout: float = 120.0
    """Seconds for one request, from sending to the last byte of the answer."""
    retries: int = 6
    """Number of further attempts after overload, a timeout, a broken connection or a malformed answer."""
    first_wait: float = 1.0
    """Longest wait in seconds before the first retry, doubled with each; the wait is drawn uniformly below it."""
    longest_wait: float = 60.0
    """Longest wait of all in seconds; a request fails if the server asks for more by Retry-After."""
    requests_per_minute: float | None = None
    """Largest number of requests per minute of each process, evenly spread."""
    give_up: int = 64
    """Number of consecutive failed requests, without an answer between them, that stops the run; 8 before the first
    answer."""
    extra: str = "{}"
    """Additional parameters of every request as a JSON object, such as '{"seed": 1}'; null removes a parameter."""
    cache: Path | None = None
    """Folder in which answers are cached, so that no question is paid for twice."""
    replay: bool = False
    """Answer only from the cache, without a server."""
    prompt_price: float = 0.0
    """Price of a million prompt tokens."""
    completion_price: float = 0.0
    """Price of a million completion tokens."""

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env is not the name of a variable; put the key into an environment variable and give its name"
            )
        for name, least in (("concurrency", 1), ("retries", 0), ("give_up", 1), ("prompt_price", 0),
                            ("completion_price", 0), ("first_wait", 0), ("longest_wait", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.timeout <= 0:
            raise ValueError(f"timeout is {self.timeout}; it must be above 0")
        if self.requests_per_minute is not None and self.requests_per_minute <= 0:
            raise ValueError(f"requests_per_minute is {self.requests_per_minute}; it must be above 0")
        if self.replay and self.cache is None:
            raise ValueError("replay answers only from the cache; give the cache's folder too")
        self.extra_parameters()

    def extra_parameters(self) -> dict[str, Any]:
        """Parse ``extra``."""
        try:
            found = json.loads(self.extra)
        except json.JSONDecodeError as error:
            raise ValueError(f"extra is not JSON ({error}); write it like '{{\"seed\": 1}}'") from error
        if not isinstance(found, dict):
            raise ValueError(f"extra is {self.extra}; it must be a JSON object such as '{{\"seed\": 1}}'")
        return found


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    # An address is written into manifests, so nothing secret may be in it; nor is it repeated here.
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "base_url contains credentials or a query; give the key in the environment variable that api_key_env names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url is {url!r}; write it as http://127.0.0.1:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"base_url is {url!r}; leave out /chat and what follows")


class Clock:
    """The time in seconds, and waiting."""

    def now(self) -> float:
        """Return the time, from an arbitrary beginning."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class Pace:
    """When the next request may be sent: evenly spread, and not while the server asks to wait."""

    def __init__(self, per_minute: float | None, clock: Clock) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._free = clock.now()
        self._clock = clock

    async def turn(self) -> None:
        now = self._clock.now()
        start = max(now, self._free)
        self._free = start + self._gap
        await self._clock.sleep(start - now)

    def pause(self, seconds: float) -> None:
        self._free = max(self._free, self._clock.now() + seconds)


def import_openai() -> Any:
    """Import the client library; ValueError if it is not installed."""
    return require("openai", what="asking a model", extra="eval")


def read_key(cfg: ChatConfig) -> str:
    """Return the key from the environment; ValueError if it cannot be a key, or a named variable does not exist.

    The name is not repeated in the error, because it may be the key itself, given in place of the name.
    """
    key = os.environ.get(cfg.api_key_env)
    if key is None and cfg.api_key_env != USUAL_KEY:
        raise ValueError(
            "the environment has no variable with the name in api_key_env; put the key into one and give its name"
        )
    key = key or KEYLESS
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the key in {cfg.api_key_env} has invalid characters; copy it again")
    return key


class Server:
    """Connections to a server, with clear messages for what goes wrong."""

    def __init__(self, cfg: ChatConfig, clock: Clock) -> None:
        self.cfg = cfg
        self.pace = Pace(cfg.requests_per_minute, clock)
        self._openai, self._key = import_openai(), read_key(cfg)
        self._way = way_to(cfg.base_url)
        # What the environment says about the way is in it already, so the client's library need not look there.
        http_client = self._openai.DefaultAsyncHttpxClient(
            proxy=self._way.proxy, verify=self._way.verify, trust_env=False
        )
        self._client = self._openai.AsyncOpenAI(
            base_url=cfg.base_url, api_key=self._key, max_retries=0, timeout=cfg.timeout, http_client=http_client
        )

    async def close(self) -> None:
        await self._client.close()

    async def ask(self, question: Question) -> tuple[Answer | Failure, float | None]:
        """Ask once; return the answer, or the failure with the seconds that the server asks to wait.

        Raises ValueError for anything that would fail every question."""
        openai = self._openai
        body = {"model": self.cfg.model, "messages": [question.message()], **question.parameters}
        try:
            async with asyncio.timeout(self.cfg.timeout):
                # As text, and past the library's walk through every type: a quarter of a small question's time.
                reply = await self._client.post("/chat/completions", cast_to=str, body=body)
        except (TimeoutError, openai.APITimeoutError):
            return Failure(reason="timeout", detail=f"no answer within {self.cfg.timeout:g} seconds"), None
        except openai.APIConnectionError as error:
            trouble = self._way.explain(self._clean(str(error.__cause__ or error), 300))
            return Failure(reason="no connection", detail=trouble), None
        except openai.APIStatusError as error:
            wait = retry_after(error.response.headers.get("retry-after"))
            return self._refusal(error.status_code, error.code, self._clean(error.message, 300)), wait
        try:
            return read_answer(self._clean(reply)), None
        except ValueError as error:
            return Failure(reason="malformed answer", detail=str(error)), None

    def _refusal(self, status: int, code: str | None, message: str) -> Failure:
        """Return the failure of this question; ValueError if every question would fail."""
        fix = {
            401: f"put a valid key into the environment variable {self.cfg.api_key_env}",
            402: "the account has no credit left",
            404: f"check that the address, which usually ends in /v1, is right and serves {self.cfg.model!r}",
        }.get(status)
        if code == "insufficient_quota":
            fix = "the account has no credit left"
        if fix is not None:
            raise ValueError(f"{self.cfg.base_url} refuses: {message}; {fix}") from None
        return Failure(reason=f"HTTP {status}", detail=message, final=status < 500 and status not in (408, 409, 429))

    def _clean(self, text: str, longest: int | None = None) -> str:
        """Return a server's message as one short line, without the key, which it may have repeated."""
        if len(self._key) > len(KEYLESS):
            text = text.replace(self._key, "[key]")
        return text if longest is None else " ".join(text.split())[:longest]


def retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which may be a date; None if it is unreadable."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # no date, or one without its zone
        return None
