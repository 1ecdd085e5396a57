"""A client of OpenAI-compatible servers: many questions at once, each answered or reported, none paid for twice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import Any, TypeVar

from semantic_routing.chat.cache import AnswerCache
from semantic_routing.chat.messages import Answer, Failure, Question, digest
from semantic_routing.chat.server import ChatConfig, Clock, Server, import_openai, read_key
from semantic_routing.common.connection import way_to
from semantic_routing.common.files import check_writable

T = TypeVar("T")
FIRST_FAILURES = 8
"""Failures before any answer after which the run gives up."""


@dataclass
class Usage:
    """Counts of a client's requests and answers so far."""

    requests: int = 0
    """Sent, retries among them."""
    answered: int = 0
    """Questions that the server answered."""
    cached: int = 0
    """Questions that were answered from the cache, or by the answer to an identical question."""
    failed: int = 0
    """Questions without an answer."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """In the unit of the prices."""


class ChatClient:
    """Asks one model questions, many at the same time.

    Every question is answered or reported as a ``Failure``, once. The whole run ends with ValueError for anything that
    would fail every question: a rejected key, an unknown model, a server that does not answer.
    """

    def __init__(self, cfg: ChatConfig, clock: Clock | None = None) -> None:
        """Ask as ``cfg`` says; all waits are those of ``clock``, by default the system's."""
        if not cfg.model:
            raise ValueError("no model: give the name of the model on the server")
        if not cfg.replay:  # report what is missing before any work is done
            import_openai()
            read_key(cfg)
            way_to(cfg.base_url)
            if cfg.cache is not None:
                check_writable(cfg.cache)
        self.cfg = cfg
        self._clock = clock or Clock()
        self.usage = Usage()
        self.cache = None if cfg.cache is None else AnswerCache(cfg.cache)
        self._extra = cfg.extra_parameters()
        self._asked: dict[str, asyncio.Future[Answer | Failure]] = {}
        self._failures_in_a_row = 0
        self._worked = False

    def identity(self) -> dict[str, Any]:
        """Return the server and model that are asked, for manifests, without secrets."""
        try:
            versions = {"openai": version("openai")}
        except PackageNotFoundError:  # replay needs none
            versions = {}
        cfg = self.cfg
        return {"model": cfg.model, "base_url": cfg.base_url, "extra": self._extra, "versions": versions}

    def run(self, items: Iterable[T], make: Callable[[T], Question | Failure]) -> Iterator[tuple[T, Answer | Failure]]:
        """Run ``answers`` for synchronous callers; requests wait while the caller handles an answer."""
        answers = self.answers(items, make)

        async def following() -> tuple[T, Answer | Failure] | None:
            return await anext(answers, None)

        with asyncio.Runner() as runner:  # closing it ends what is under way
            while (found := runner.run(following())) is not None:
                yield found

    async def answers(
        self, items: Iterable[T], make: Callable[[T], Question | Failure]
    ) -> AsyncIterator[tuple[T, Answer | Failure]]:
        """Yield every item with its answer, in order of arrival.

        Args:
            items: Anything; taken as there is room for more requests.
            make: The question of an item, or why there can be none. Runs in threads, so it may read and encode.
        """
        server = None if self.cfg.replay else Server(self.cfg, self._clock)
        waiting = iter(items)
        underway: dict[asyncio.Task[Answer | Failure], T] = {}
        try:
            while True:
                for item in islice(waiting, self.cfg.concurrency - len(underway)):
                    underway[asyncio.create_task(self._answer(server, item, make))] = item
                if not underway:
                    return
                done, _ = await asyncio.wait(underway, return_when=asyncio.FIRST_COMPLETED)
                # What stops the run comes last, so that no answer beside it is lost.
                for task in sorted(done, key=lambda task: task.exception() is not None):
                    yield underway.pop(task), task.result()
        finally:
            for task in underway:
                task.cancel()
            await asyncio.gather(*underway, return_exceptions=True)
            self._asked.clear()
            if server is not None:
                await server.close()

    async def _answer(
        self, server: Server | None, item: T, make: Callable[[T], Question | Failure]
    ) -> Answer | Failure:
        """Return the answer to an item's question; identical questions in flight share one request."""
        prepared = await asyncio.to_thread(self._prepare, item, make)
        if isinstance(prepared, Failure):
            self.usage.failed += 1
            return prepared
        question, facts, name = prepared
        if shared := self._asked.get(name):
            answer = await shared
            if isinstance(answer, Answer):
                answer = replace(answer, cached=True)
        else:
            task = self._asked[name] = asyncio.ensure_future(self._remembered(server, question, facts, name))
            answer = await task
            if self.cache is not None or isinstance(answer, Failure):
                del self._asked[name]
        self.usage.failed += isinstance(answer, Failure)
        self.usage.cached += isinstance(answer, Answer) and answer.cached
        return answer

    def _prepare(
        self, item: T, make: Callable[[T], Question | Failure]
    ) -> tuple[Question, dict[str, Any], str] | Failure:
        question = make(item)
        if isinstance(question, Failure):
            return question
        merged = {**question.parameters, **self._extra}
        question = replace(question, parameters={name: value for name, value in merged.items() if value is not None})
        facts = question.facts(self.cfg.model)
        return question, facts, digest(facts)

    async def _remembered(
        self, server: Server | None, question: Question, facts: dict[str, Any], name: str
    ) -> Answer | Failure:
        """Return an answer from the cache, or ask the server and cache it."""
        if self.cache is not None and (found := await asyncio.to_thread(self.cache.get, name)) is not None:
            self._worked = True
            return found
        if server is None:
            return Failure(
                reason="not in the cache", detail=f"no {name}.json in {self.cfg.cache}; run the command without replay"
            )
        answer = await self._ask(server, question)
        if isinstance(answer, Answer):
            answer = replace(answer, question=name)
        # An answer without the logprobs asked for is not cached: once the server is fixed, it is asked again.
        whole = isinstance(answer, Answer) and not (question.parameters.get("logprobs") and answer.logprobs is None)
        if self.cache is not None and isinstance(answer, Answer) and whole:
            await asyncio.to_thread(self.cache.put, name, facts, answer)
        return answer

    async def _ask(self, server: Server, question: Question) -> Answer | Failure:
        """Ask the server, with retries: exponential back-off with full jitter, added to Retry-After."""
        cfg, failure = self.cfg, Failure(reason="not asked")
        for attempt in range(cfg.retries + 1):
            await server.pace.turn()
            self.usage.requests += 1
            answer, wait = await server.ask(question)
            if isinstance(answer, Answer):
                self._count(answer)
                return answer
            failure = answer
            if failure.final or attempt == cfg.retries:
                break
            if wait is not None and wait > cfg.longest_wait:
                failure = replace(failure, detail=f"{failure.detail}; the server asks to wait {wait:.0f} seconds")
                break
            if wait is not None:
                server.pace.pause(wait)
            jitter = random.uniform(0, min(cfg.longest_wait, cfg.first_wait * 2**attempt))
            await self._clock.sleep((wait or 0.0) + jitter)
        # A refusal is about the one question where others were answered, and else about all of them.
        self._failures_in_a_row += not (failure.final and self._worked)
        if self._failures_in_a_row >= (cfg.give_up if self._worked else min(cfg.give_up, FIRST_FAILURES)):
            raise ValueError(
                f"{cfg.base_url} gave no answer to {self._failures_in_a_row} requests in a row, the last: {failure}; "
                "check that the server runs and supports the request's parameters, then run the same command again"
            )
        return failure

    def _count(self, answer: Answer) -> None:
        self._failures_in_a_row, self._worked = 0, True
        self.usage.answered += 1
        self.usage.prompt_tokens += answer.prompt_tokens
        self.usage.completion_tokens += answer.completion_tokens
        prices = answer.prompt_tokens * self.cfg.prompt_price + answer.completion_tokens * self.cfg.completion_price
        self.usage.cost += prices / 1e6
